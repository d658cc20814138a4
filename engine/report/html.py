"""Makes report.html: one file that opens offline, with its pictures inside; readable on a phone, light or dark.

It lays out what run_folder.py has read; sentences come from verdict.py, rows from tables.py. There are no scripts, and
nothing is fetched from anywhere.
"""

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from ..models.families.find import FAMILIES
from .pictures import BeforeAfter, curve, cut_apart
from .run import Run
from .tables import by_change, count_rows, ledger_rows, score_rows, stage_rows, what_ran
from .verdict import NOT_MEASURED, Verdict, number, verdict

EXTREMES = 3  # prompts that are shown as most changed, and as many as least changed
FILES = ("before_after.png", "curves.png", "metrics.jsonl", "heldout.jsonl", "summary.json", "config.yaml")
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
header p { color: var(--faint); margin: 0; overflow-wrap: anywhere; font-size: 0.92rem; }
header { margin-bottom: 1.1rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0.3rem 0 1.2rem; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 0.7rem; }
ul.findings { list-style: none; margin: 0; padding: 0; }
ul.findings li { padding: 0.4rem 0 0.4rem 1.7rem; position: relative; }
ul.findings li::before { position: absolute; left: 0.2rem; font-weight: 700; }
li.good::before { content: "\\2713"; color: var(--good); } li.bad::before { content: "!"; color: var(--bad); }
li.open::before { content: "\\2013"; color: var(--open); } li.bad { color: var(--bad); }
table { border-collapse: collapse; min-width: min(100%, 32rem); font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.4rem 0 0.4rem 1.4rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 500; color: var(--faint); font-size: 0.88rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.good, td.bad { font-weight: 600; } td.good { color: var(--good); } td.bad { color: var(--bad); }
tr.part td:first-child { padding-left: 1.2rem; } tr.part td { color: var(--faint); } tr.total td { font-weight: 600; }
td.bar { width: 40%; vertical-align: middle; } td.bar i { display: block; height: 0.6rem; border-radius: 2px;
  background: var(--accent); } tr.part td.bar i { opacity: 0.45; }
table.changed { width: 100%; max-width: 46rem; } table.changed td:first-child { white-space: normal; }
table.changed th { padding-top: 1.1rem; }
.pair { display: flex; gap: 4px; } .pair img { display: block; width: 100%; border-radius: 4px; }
.pair span { flex: 1; min-width: 0; color: var(--faint); font-size: 0.82rem; }
td .pair { max-width: 12rem; margin-top: 0.3rem; }
.grid { display: grid; gap: 1.6rem 1.4rem; grid-template-columns: repeat(3, minmax(0, 1fr)); }
figure { margin: 0; } figure img { width: 100%; display: block; } figure.sheet { background: #ffffff; }
figcaption { font-size: 0.94rem; margin-top: 0.3rem; overflow-wrap: anywhere; }
figcaption b, figcaption span { display: block; } figcaption span { color: var(--faint); font-size: 0.88rem; }
figure.chart { display: flex; flex-direction: column; justify-content: space-between; }
.chart figcaption { margin: 0 0 0.3rem; }
.note { color: var(--faint); font-size: 0.92rem; max-width: 46rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 0.9rem 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.3rem 1.4rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
a { color: var(--accent); }
@media (max-width: 700px) { .grid { grid-template-columns: minmax(0, 1fr); }
  th, td { padding-left: 0.75rem; font-size: 0.88rem; } td.bar { width: 30%; } h1 { font-size: 1.35rem; }
  table.scores, table.scores tbody { display: block; } table.scores tr.head { display: none; }
  table.scores tr { display: grid; grid-template-columns: 1fr 1fr 1fr; padding: 0.5rem 0;
    border-bottom: 1px solid var(--rule); }
  table.scores td { border: 0; padding: 0.1rem 0; text-align: left; white-space: normal; }
  table.scores td:first-child, table.scores td:last-child { grid-column: 1 / -1; }
  table.scores td:first-child { font-weight: 600; }
  table.scores td:not(:first-child)::before { content: attr(data-label) " "; color: var(--faint); font-weight: 400; } }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700; margin-top: 2.6rem; }
"""


def page(run: Run) -> str:
    """Returns the HTML of a run's report, with the pictures of the run folder; it says which of them are missing."""
    summary, said, cuts = run.summary, verdict(run), cut_apart(run.dir / "before_after.png")
    ledger = ledger_rows(summary)
    sections = [
        _head(run, said),
        _scores(run, said),
        _extremes(run, cuts),
        "" if run.trains_judge else _before_and_after(run, cuts),
        _section("While it trained", _curves(run)),
        _section("Where the time went", _times(summary)),
        _section("What was done", _list(count_rows(summary))),
        _section("What it cost the GPU", _list(ledger)) if ledger else "",
        _section("Where things lie", _places(run)),
        "" if run.trains_judge else _section("Use the LoRA", f"<pre><code>{escape(_snippet(run))}</code></pre>"),
        f"<details><summary>Configuration</summary><pre>{escape(run.config or NOT_MEASURED)}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>strop: {escape(run.dir.resolve().name)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, sections))}\n</main></body></html>\n"
    )


def _head(run: Run, said: Verdict) -> str:
    items = "".join(f'<li class="{finding.kind}">{escape(finding.text)}</li>' for finding in said.findings)
    name = escape(run.dir.resolve().name)
    return (
        f"<header><p>strop, report of {name}</p><h1>{escape(said.headline)}</h1>"
        f'<p>{escape(what_ran(run))}</p></header><ul class="findings">{items}</ul>'
    )


def _scores(run: Run, said: Verdict) -> str:
    rows = score_rows(run)
    if not rows:
        return _section("Held-out scores", f"<p>{NOT_MEASURED}</p>")
    count = run.summary.get(f"heldout_{run.heldout}")
    unseen = f"{f'{count:,} ' if count else ''}{run.heldout} that were not trained on"
    note = f"Means over {unseen}, same noise for both models. The interval is that of the paired change."
    if run.trains_judge:
        note = f"Share of {unseen} which the judge orders as labelled; a wide interval, as if of independent answers."
    note += " A change in colour is beyond chance, all claims about the run taken together."
    labels = ("", "base", "tuned", "change", "95% interval")
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    kinds = {1: ' class="good"', -1: ' class="bad"', 0: ""}
    body = ""
    for row in rows:
        marks = ("", "", "", kinds[said.directions[row[0]]], "")
        cells = (
            f'<td{m} data-label="{label}">{escape(c)}</td>' for m, label, c in zip(marks, labels, row, strict=True)
        )
        body += f"<tr>{''.join(cells)}</tr>"
    return _section("Held-out scores", f'<table class="scores"><tr class="head">{head}</tr>{body}</table>{_note(note)}')


def _extremes(run: Run, cuts: Sequence[BeforeAfter]) -> str:
    """Returns the prompts whose score rose most and least, with their pictures where before_after.png has them."""
    score, order = by_change(run)
    if not order:
        return ""
    count = min(EXTREMES, len(order) // 2) or 1
    groups = {"rose most": order[:count], "rose least, or fell most": order[count:][-count:][::-1]}
    body = ""
    for title, rows in groups.items():
        body += f"<tr><th>{title}</th><th>base</th><th>tuned</th><th>change</th></tr>" if rows else ""
        for row in rows:
            prompt, values = run.prompts[row].get("prompt", ""), run.prompts[row]["scores"][score]
            numbers = (number(values["base"]), number(values["tuned"]), number(values["tuned"] - values["base"], "+"))
            picture = _pair(cuts[row]) if row < len(cuts) else ""
            cells = "".join(f"<td>{escape(text)}</td>" for text in numbers)
            body += f"<tr><td>{escape(prompt)}{picture}</td>{cells}</tr>"
    note = _note(
        f"By {score}, of {len(order):,} held-out prompts; heldout.jsonl has them all. One prompt proves nothing."
    )
    return _section("Most and least changed", f'<table class="changed">{body}</table>{note}')


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
    return f"<table>{''.join(cells)}</table>"


def _before_and_after(run: Run, cuts: Sequence[BeforeAfter]) -> str:
    """Returns base and tuned picture of the first prompts; as one sheet where only that is known."""
    if not cuts:
        picture = _sheet(run.dir / "before_after.png", "Base model above, tuned model below")
        return _section("Before and after", picture)
    figures = ""
    for cut, line in zip(cuts, run.prompts or [{}] * len(cuts), strict=False):
        scores = (line.get("scores") or {}).items()
        changes = "".join(f"<span>{escape(name)} {_change(values)}</span>" for name, values in scores)
        figures += f"<figure>{_pair(cut)}<figcaption>{escape(line.get('prompt', ''))}{changes}</figcaption></figure>"
    note = _note("The two pictures of a prompt start from the same noise.")
    return _section("Before and after", f'<div class="grid">{figures}</div>{note}')


def _change(values: dict) -> str:
    return f"{number(values.get('base'))} to {number(values.get('tuned'))}"


def _pair(cut: BeforeAfter) -> str:
    pictures = (
        f'<span><img alt="{name} model" src="{_embedded(png)}">{name}</span>'
        for name, png in zip(cut._fields, cut, strict=True)
    )
    return f'<div class="pair">{"".join(pictures)}</div>'


def _curves(run: Run) -> str:
    """Returns a picture for each drawn column, under its title and what is healthy, and why others have none."""
    figures = ""
    for column in run.columns:
        if column.drawn:
            png = _embedded(curve(run.records, column, run.judged_timesteps))
            caption = f"<b>{escape(column.drawn.title)}</b> <span>{escape(column.drawn.healthy)}</span>"
            picture = f'<img class="chart" alt="{escape(column.drawn.title)} over the iterations" src="{png}">'
            figures += f'<figure class="chart"><figcaption>{caption}</figcaption>{picture}</figure>'
    notes = " ".join(column.not_drawn for column in run.columns if column.not_drawn)
    return f'<div class="grid">{figures}</div>{_note(notes) if notes else ""}'


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


def _places(run: Run) -> str:
    """Returns what the run left, by name, with links relative to the report for what lies in its folder."""
    paths = {name: str(path) for name, path in (run.summary.get("paths") or {}).items()}
    folder = paths.get("run", str(run.dir))
    rows = [f"<dt>run</dt><dd>{escape(str(run.dir.resolve()))}</dd>"]
    for name, path in paths.items():
        inside = Path(os.path.relpath(path, folder)).as_posix()
        if name not in ("run", "report"):
            rows.append(f"<dt>{escape(name)}</dt><dd>{_link(run, inside, path)}</dd>")
    names = [name for name in (*FILES, "tensorboard", "wandb") if (run.dir / name).exists()]
    return f"<dl>{''.join(rows)}<dt>files</dt><dd>{', '.join(_link(run, name, name) for name in names)}</dd></dl>"


def _link(run: Run, inside: str, otherwise: str) -> str:
    """Returns a link to a file of the run folder; for anything else, its path as text."""
    if inside.startswith("..") or not (run.dir / inside).exists():
        return escape(otherwise)
    return f'<a href="{quote(inside)}">{escape(inside)}</a>'


def _sheet(path: Path, alt: str) -> str:
    if not path.is_file():
        return f"<p>{NOT_MEASURED}: there is no {escape(path.name)}</p>"
    picture = f'<img alt="{escape(alt)}" src="{_embedded(path.read_bytes())}">'
    return f'<figure class="sheet">{picture}</figure>{_note(alt + ".")}'


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(label)}</dt><dd>{escape(value)}</dd>' for label, value in rows)}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
