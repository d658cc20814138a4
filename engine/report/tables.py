"""Writes the numbers of a finished run as rows of text, for the terminal and for the page."""

import textwrap

from ..evaluation.monitor import independent_of_judge
from ..runtime.ledger import NOT_AVAILABLE
from ..runtime.progress import duration
from .run import Run
from .verdict import NOT_MEASURED, interval, number

LEDGER = {  # label: (name in the summary's ledger, format of its value)
    "GPU-hours": ("gpu_hours", "{:,.3f}"),
    "energy": ("energy_kwh", "{:,.3f} kWh"),
    "share of peak": ("share_of_peak", "{:.1%} in rollout and update"),
    "utilisation": ("utilisation", "{:.1%}"),
    "SM clock": ("sm_mhz", "{:,.0f} MHz"),
    "memory clock": ("memory_mhz", "{:,.0f} MHz"),
    "throttled": ("throttled", "{:.1%} of the time by {}"),
}

COUNTS = {  # name in the summary: label
    "iterations": "iterations",
    "prompts": "prompts",
    "pairs": "preference pairs",
    "optimizer_steps": "optimizer steps",
    "heldout_prompts": "held-out prompts",
    "world_size": "processes",
}
JUDGE_COUNTS = {  # the same for a run that trains a judge, where each prompt is that of a pair
    "iterations": "iterations",
    "pairs": "pairs shown",
    "optimizer_steps": "optimizer steps",
    "training_pairs": "training pairs",
    "heldout_pairs": "held-out pairs",
    "world_size": "processes",
}


def what_ran(run: Run) -> str:
    """Returns what was run in one line: method, model, judge, iterations, optimizer steps and learning rate."""
    recipe, summary = run.recipe, run.summary
    model, judge = ((recipe.get(section) or {}).get("path") for section in ("model", "judge"))
    optim, rollout = recipe.get("optim") or {}, recipe.get("rollout") or {}
    steps = summary.get("optimizer_steps")
    if run.trains_judge:
        facts = [
            f"training of a judge from {judge}",
            f"for {model}",
            f"pairs of {(recipe['data'] or {}).get('source')}",
        ]
    else:
        inner, prompts = rollout.get("inner_steps", 1), rollout.get("prompts")
        iterations = f"{run.iterations:,} iterations" + (f" of {prompts} prompts" if prompts else "")
        method = run.config_class.name if inner == 1 else f"MSPO ({inner} inner steps)"
        facts = [f"{method} on {model}", f"judge {judge}", iterations]
    facts += [f"{steps:,} optimizer steps"] if steps else []
    facts += [f"learning rate {optim['lr']:g}"] if "lr" in optim else []
    return ", ".join(facts) if recipe else f"recipe {NOT_MEASURED}: there is no config.yaml"


def closing_table(run: Run) -> str:
    """Returns the end of a finished run for the terminal: scores, time by stage, counts, paths.

    Lines have at most 80 columns; those of paths, which are not cut, may have more.
    """
    summary = run.summary
    lines = [_line("", "base", "tuned", "change", "95% interval"), *(_line(*row) for row in score_rows(run))]
    if len(lines) == 1:
        lines = [f"held-out scores are {NOT_MEASURED}"]
    stages = stage_rows(summary.get("seconds") or {})
    lines += ["", f"{'time':<24}{'' if stages else NOT_MEASURED:>14}{'share' if stages else '':>14}".rstrip()]
    for name, time, share in stages:
        label = "  " * name.count("/") + name.rsplit("/", 1)[-1]
        lines.append(f"{label:<24}{time:>14}{'' if share is None else f'{share:.1%}':>14}".rstrip())
    lines += ["", *(f"{label:<24}{value}" for label, value in count_rows(summary))]
    gpu = [_wrapped(f"{label:<16}{value}") for label, value in ledger_rows(summary)]
    lines += ["", *gpu] if gpu else []
    lines += ["", *(f"{name:<14}{path}" for name, path in (summary.get("paths") or {}).items())]
    return "\n".join(lines)


def score_rows(run: Run) -> list[tuple[str, str, str, str, str]]:
    """Returns (name, base, tuned, change, 95% interval) as text, one row for each held-out comparison.

    In place of an interval that was not computed stands why.
    """
    return [
        (name, number(row.get("base")), number(row.get("tuned")), number(row.get("delta"), "+"), interval(row))
        for name, row in run.compared.items()
    ]


def by_change(run: Run) -> tuple[str, list[int]]:
    """Returns a held-out score and the lines of heldout.jsonl, the one first whose score rose most.

    The score is the first that tells prompts apart: one that is independent of the judge where there is such a one, and
    not only right or wrong. ("", []) where there is none.
    """
    scores = (run.prompts[0].get("scores") or {}) if run.prompts else {}
    for name in sorted(scores, key=independent_of_judge, reverse=True):
        values = [(line.get("scores") or {}).get(name) or {} for line in run.prompts]
        changes = {
            row: each["tuned"] - each["base"]
            for row, each in enumerate(values)
            if each.get("tuned") is not None and each.get("base") is not None
        }
        if not {-1.0, 0.0, 1.0}.issuperset(changes.values()):
            return name, sorted(changes, key=changes.get, reverse=True)
    return "", []


def stage_rows(seconds: dict) -> list[tuple[str, str, float | None]]:
    """Returns (stage, time, share of the total), parts such as "rollout/decode" after their stage, the total last.

    Times are in seconds, or all as h:mm:ss from ten minutes on. Time that is in no stage is the row "other";
    shares are None when no total was measured.
    """
    measured = {name: value for name, value in seconds.items() if name != "total" and value is not None}
    total = seconds.get("total")
    stages = [name for name in measured if "/" not in name or name.split("/")[0] not in measured]
    order = [part for stage in stages for part in measured if part == stage or part.startswith(stage + "/")]
    rows = [(name, measured[name]) for name in order]
    if total:
        other = total - sum(measured[name] for name in stages)
        rows += [("other", other)] if other > 0.005 * total else []
        rows.append(("total", total))
    long = max((value for _, value in rows), default=0) >= 600
    return [
        (name, duration(value) if long else f"{value:.1f} s", value / total if total else None) for name, value in rows
    ]


def count_rows(summary: dict) -> list[tuple[str, str]]:
    """Returns (label, value) of the counts of a run, its device, seed and version."""
    judge = "training_pairs" in summary
    counts = JUDGE_COUNTS if judge else COUNTS
    rows = [(label, summary.get(name)) for name, label in counts.items()]
    rows = [(label, count(value)) for label, value in rows]
    pace = summary.get("prompts_per_second")
    if pace is not None:
        items, stage = ("pairs", "show") if judge else ("prompts", "rollout")
        rows.insert(2, (f"{items} per second", f"{pace:.3g} in {stage} and update"))
    if waiting := summary.get("waiting_micro_batches"):
        rows.append(("not learned from", f"{waiting:,} micro-batches, too few for an optimizer step"))
    state = summary.get("optimizer_state_bytes_per_rank")
    if state is not None:
        rows.append(("optimizer state", f"{state / 2**20:,.1f} MiB per process"))
    named = {name: summary.get(name) for name in ("device", "seed", "version")}
    return rows + [(name, str(value)) for name, value in named.items() if value is not None]


def count(value: int | None) -> str:
    """Writes a count, or that there is none."""
    return NOT_MEASURED if value is None else f"{value:,}"


def ledger_rows(summary: dict) -> list[tuple[str, str]]:
    """Returns (label, value) of a run's ledger; the last row names the values that were not available.

    There are no rows for a run on a CPU, nor for one whose device is not known yet.
    """
    ledger = summary.get("ledger")
    if summary.get("device", "cpu") == "cpu" and not isinstance(ledger, dict):
        return []
    ledger = ledger if isinstance(ledger, dict) else {}
    rows, missing = [], []
    for label, (name, form) in LEDGER.items():
        value = ledger.get(name)
        if value is None:
            missing.append(label)
        elif isinstance(value, dict):
            shares = [form.format(share, reason.replace("_", " ")) for reason, share in value.items() if share]
            rows.append((label, ", ".join(shares) or "none"))
        else:
            rows.append((label, form.format(value)))
    return rows + ([(NOT_AVAILABLE, ", ".join(missing))] if missing else [])


def _line(name: str, base: str, tuned: str, change: str, interval: str) -> str:
    return f"{name:<22}{base:>11}{tuned:>11}{change:>11}{interval:>25}"


def _wrapped(row: str) -> str:
    """Breaks a row to 80 columns; further lines are indented to the value of the first."""
    return textwrap.fill(row, 80, subsequent_indent=16 * " ")
