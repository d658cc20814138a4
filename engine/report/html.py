"""Makes report.html: one file that opens offline, with its pictures inside; readable on a phone, light or dark.

It lays out what run_folder.py has read; sentences come from verdict.py, rows from tables.py. There are no scripts, and
nothing is fetched from anywhere.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..models.families.find import FAMILIES
from .run import Run
from .tables import count_rows, ledger_rows, score_rows, stage_rows
from .verdict import NOT_MEASURED, headline, verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --faint: #667080; --paper: #fbfbf9; --card: #ffffff; --rule: #e3e5e8;
  --accent: #1f6f8b; --good: #2c7a4b; --bad: #b4532a; --open: #667080; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --faint: #98a1ad; --paper: #15181b; --card: #1d2125;
  --rule: #30363d; --accent: #62b6d3; --good: #6cc48e; --bad: #e08a5f; --open: #98a1ad; }
  img.chart { filter: invert(0.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
header p { color: var(--faint); margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0.3rem 0 1.2rem; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 0.7rem; }
ul.findings { list-style: none; margin: 0; padding: 0; }
ul.findings li { padding: 0.4rem 0 0.4rem 1.7rem; position: relative; }
ul.findings li::before { position: absolute; left: 0.2rem; font-weight: 700; }
li.good::before { content: "\\2713"; color: var(--good); } li.bad::before { content: "!"; color: var(--bad); }
li.open::before { content: "\\2013"; color: var(--open); } li.bad { color: var(--bad); }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; min-width: min(100%, 32rem); font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.4rem 0 0.4rem 1.4rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { font-weight: 500; color: var(--faint); font-size: 0.88rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.part td:first-child { padding-left: 1.2rem; } tr.part td { color: var(--faint); } tr.total td { font-weight: 600; }
@media (max-width: 600px) { th, td { padding-left: 0.75rem; font-size: 0.88rem; } }
td.bar { width: 40%; min-width: 7rem; } td.bar i { display: block; height: 0.6rem; border-radius: 2px;
  background: var(--accent); } tr.part td.bar i { opacity: 0.45; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--rule); border-radius: 8px; overflow-x: auto; }
figure.chart { background: none; } figure img { display: block; width: 100%; min-width: 760px; border-radius: 8px; }
.note { color: var(--faint); font-size: 0.92rem; max-width: 46rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 0.9rem 1rem;
  overflow-x: auto; font: 0.86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.4rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700; margin-top: 2.6rem; }
"""


def page(run: Run) -> str:
    """Returns the HTML of a run's report, with the pictures of the run folder; it says which of them are missing."""
    run_dir, summary, config = run.dir, run.summary, run.config
    notes = " ".join(column.not_drawn for column in run.columns if column.not_drawn)
    sections = [
        _head(run),
        _scores(run),
        "" if run.trains_judge else _before_and_after(run_dir),
        _section("While it trained", _picture(run_dir / "curves.png", "Curves over the iterations", chart=True)
                 + (_note(notes) if notes else "")),
        _section("Where the time went", _times(summary)),
        _section("What was done", _list(count_rows(summary))),
        _section("What it cost the GPU", _list(ledger_rows(summary))),
        _section("Where things lie", _list((name, str(path)) for name, path in _paths(run_dir, summary))),
        "" if run.trains_judge else _section("Use the LoRA", f"<pre><code>{escape(_snippet(run))}</code></pre>"),
        f"<details><summary>Configuration</summary><pre>{escape(config or NOT_MEASURED)}</pre></details>",
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>strop: {escape(run_dir.resolve().name)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(sections)}\n</main></body></html>\n"
    )


def _head(run: Run) -> str:
    findings = verdict(run)
    items = "".join(f'<li class="{finding.kind}">{escape(finding.text)}</li>' for finding in findings)
    name = escape(run.dir.resolve().name)
    return (
        f"<header><p>strop, report of {name}</p><h1>{escape(headline(findings, run.heldout))}</h1></header>"
        f'<ul class="findings">{items}</ul>'
    )


def _scores(run: Run) -> str:
    rows = score_rows(run.summary)
    if not rows:
        return _section("Held-out scores", f"<p>{NOT_MEASURED}</p>")
    count = run.summary.get(f"heldout_{run.heldout}")
    unseen = f"{f'{count:,} ' if count else ''}{run.heldout} that were not trained on"
    note = (
        f"Means over {unseen}, same noise for both models. The interval is that of the paired change, mean \u00b1 1.96 "
        "standard errors."
    )
    if run.trains_judge:
        note = f"Share of {unseen} which the judge orders as labelled; a wide interval, as if of independent answers."
    return _section("Held-out scores", _table(("", "base", "tuned", "change", "95% interval"), rows) + _note(note))


def _times(summary: dict) -> str:
    rows = stage_rows(summary.get("seconds") or {})
    if not rows:
        return f"<p>{NOT_MEASURED}</p>"
    cells = []
    for name, seconds, share in rows:
        kind = "total" if name == "total" else "part" if "/" in name else "stage"
        bar = "" if share is None or kind == "total" else f'<i style="width:{100 * share:.1f}%"></i>'
        text = "" if share is None else f"{share:.1%}"
        label = escape(name.rsplit("/", 1)[-1])
        columns = f'<td>{label}</td><td>{seconds}</td><td>{text}</td><td class="bar">{bar}</td>'
        cells.append(f'<tr class="{kind}">{columns}</tr>')
    return f'<div class="wide"><table>{"".join(cells)}</table></div>'


def _before_and_after(run_dir: Path) -> str:
    picture = _picture(run_dir / "before_after.png", "Base model above, tuned model below")
    note = _note("Base model above, tuned model below; each column starts from the same noise.")
    return _section("Before and after", picture + note)


def _snippet(run: Run) -> str:
    """Returns five lines of diffusers code that draw a picture with the LoRA of a run."""
    summary = run.summary
    base = (run.recipe.get("model") or {}).get("path", "BASE_MODEL")
    lora = (summary.get("paths") or {}).get("lora", "LORA")
    kind, load = "AutoPipelineForText2Image", "from_pretrained"
    if str(base).endswith(".safetensors"):
        pipelines = {family.name: family.pipeline for family in FAMILIES}
        kind, load = pipelines.get(summary.get("family"), FAMILIES[0].pipeline), "from_single_file"
    return (
        f"from diffusers import {kind}\n\n"
        f"pipe = {kind}.{load}({str(base)!r})\n"
        f"pipe.load_lora_weights({str(lora)!r})\n"
        'image = pipe("your prompt").images[0]\n'
        'image.save("picture.png")'
    )


def _paths(run_dir: Path, summary: dict) -> list[tuple[str, Path | str]]:
    named = {"run": run_dir.resolve()} | (summary.get("paths") or {})
    files = ("metrics.jsonl", "summary.json", "config.yaml", "tensorboard", "wandb")
    return [*named.items(), *((name, name + " in the run folder") for name in files if (run_dir / name).exists())]


def _picture(path: Path, alt: str, chart: bool = False) -> str:
    if not path.is_file():
        return f"<p>{NOT_MEASURED}: there is no {escape(path.name)}</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    kind = ' class="chart"' if chart else ""
    return f'<figure{kind}><img{kind} alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(label)}</dt><dd>{escape(value)}</dd>' for label, value in rows)}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
