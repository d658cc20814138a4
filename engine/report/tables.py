"""Writes the numbers of a finished run as rows of text, for the terminal and for the page."""

import textwrap

from ..runtime.ledger import NOT_AVAILABLE
from ..runtime.progress import duration
from .verdict import NOT_MEASURED, examined, number

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


def closing_table(summary: dict) -> str:
    """Returns the end of a run for the terminal: scores, time by stage, counts, paths.

    Lines have at most 80 columns; those of paths, which are not cut, may have more.
    """
    lines = [_line("", "base", "tuned", "change", "95% interval"), *(_line(*row) for row in score_rows(summary))]
    if len(lines) == 1:
        lines = [f"held-out scores are {NOT_MEASURED}"]
    stages = stage_rows(summary.get("seconds") or {})
    lines += ["", f"{'time':<24}{'' if stages else NOT_MEASURED:>14}{'share' if stages else '':>14}".rstrip()]
    for name, time, share in stages:
        label = "  " * name.count("/") + name.rsplit("/", 1)[-1]
        lines.append(f"{label:<24}{time:>14}{'' if share is None else f'{share:.1%}':>14}".rstrip())
    lines += ["", *(f"{label:<24}{value}" for label, value in count_rows(summary))]
    lines += ["", *(_wrapped(f"{label:<16}{value}") for label, value in ledger_rows(summary))]
    lines += ["", *(f"{name:<14}{path}" for name, path in (summary.get("paths") or {}).items())]
    return "\n".join(lines)


def score_rows(summary: dict) -> list[tuple[str, str, str, str, str]]:
    """Returns (name, base, tuned, change, 95% interval) as text, one row for each held-out comparison."""
    rows = []
    for name, row in examined(summary).items():
        interval = row.get("ci95")
        bounds = f"{number(interval[0], '+')} to {number(interval[1], '+')}" if interval else NOT_MEASURED
        rows.append((name, number(row.get("base")), number(row.get("tuned")), number(row.get("delta"), "+"), bounds))
    return rows


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
    rows = [(label, NOT_MEASURED if value is None else f"{value:,}") for label, value in rows]
    pace = summary.get("prompts_per_second")
    if pace is not None:
        items, stage = ("pairs", "show") if judge else ("prompts", "rollout")
        rows.insert(2, (f"{items} per second", f"{pace:.3g} in {stage} and update"))
    state = summary.get("optimizer_state_bytes_per_rank")
    if state is not None:
        rows.append(("optimizer state", f"{state / 2**20:,.1f} MiB per process"))
    named = {name: summary.get(name) for name in ("device", "seed", "version")}
    return rows + [(name, str(value)) for name, value in named.items() if value is not None]


def ledger_rows(summary: dict) -> list[tuple[str, str]]:
    """Returns (label, value) of a run's ledger; the last row names the values that were not available."""
    ledger = summary.get("ledger")
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
