"""Says what the numbers of a run mean, in sentences that a person can act on.

Held-out scores come first: they are better or worse only if the whole 95% interval of the paired difference is. The
records of the training add the signs of trouble. Quantities without values are said to be not measured.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from ..runtime.columns import Column
from .run import Run

NOT_MEASURED = "not measured"


class Finding(NamedTuple):
    """One sentence of the verdict; heldout: the held-out score that it compares, "" if it compares none."""

    kind: Literal["good", "bad", "open"]
    text: str
    heldout: str = ""


def examined(summary: dict) -> dict[str, dict]:
    """Returns the held-out comparisons of a summary: {"quality": {"base", "tuned", "delta", "ci95"}, ...}."""
    return {name: value for name, value in summary.items() if isinstance(value, dict) and "delta" in value}


def number(value: float | None, sign: str = "") -> str:
    """Writes a number with three decimals, a small one with two digits; sign "+" puts it before positive numbers."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:{sign}.2g}" if 0 < abs(value) < 0.00995 else f"{value:{sign},.3f}"


def verdict(run: Run) -> list[Finding]:
    """Returns the findings of a run from its records and its summary ({} for an unfinished run)."""
    findings = list(_closing(run))
    if run.records:
        for column in run.columns:
            findings += _trend(run.records, column) if column.trend else ()
        findings += _warnings(run.records, run.columns)
    return findings


def headline(findings: Sequence[Finding], heldout: str = "prompts") -> str:
    """Sums up the findings in two sentences: which scores rose or fell, and whether there are warning signs."""
    compared = [finding for finding in findings if finding.heldout]
    rose, fell = (_listed(finding.heldout for finding in compared if finding.kind == kind) for kind in ("good", "bad"))
    if rose or fell:
        changes = [f"{names} {verb}" for names, verb in ((rose, "rose"), (fell, "fell")) if names]
        first = f"On held-out {heldout} {', but '.join(changes)}, beyond chance."
    elif compared:
        first = f"No change beyond chance was measured on held-out {heldout}."
    else:
        first = f"Whether the tuned model is better on held-out {heldout} was not measured."
    warned = any(finding.kind == "bad" for finding in findings)
    return f"{first} {'There are warning signs.' if warned else 'There are no warning signs.'}"


def _closing(run: Run) -> Iterator[Finding]:
    records, summary = run.records, run.summary
    compared = examined(summary)
    for name, row in compared.items():
        yield _comparison(name, row, run)
    if not summary:
        reached = f"logged iteration {records[-1]['iteration']}" if records else "logged nothing"
        yield Finding("open", f"The run is not finished: it has {reached} so far. Held-out scores are {NOT_MEASURED}.")
    elif not compared:
        yield Finding("open", f"Held-out scores are {NOT_MEASURED}.")
    others = [name for name in compared if name not in ("judge", "alignment")]
    pleased = "judge" in compared and _direction(compared["judge"]) > 0
    if pleased and others and all(_direction(compared[name]) <= 0 for name in others):
        text = f"The judge's score rose but {_listed(others)} did not"
        yield Finding("bad", f"{text}: the policy may have learned to please the judge and nothing else.")


def _comparison(name: str, row: dict, run: Run) -> Finding:
    count = run.summary.get(f"heldout_{run.heldout}")
    where = f"on {f'{count:,} ' if count else ''}held-out {run.heldout}"
    score = "the judge's score" if name == "judge" else name
    subject = score[:1].upper() + score[1:]
    if row.get("delta") is None:
        return Finding("open", f"{subject} {where} is {NOT_MEASURED}.")
    change = f"from {number(row.get('base'))} to {number(row.get('tuned'))}"
    if not row.get("ci95"):
        return Finding("open", f"{subject} went {change} {where}, too few for an interval.", score)
    low, high = (number(bound, "+") for bound in row["ci95"])
    detail = f"{change}, by {number(row['delta'], '+')} (95% interval {low} to {high})"
    direction = _direction(row)
    if direction == 0:
        return Finding("open", f"{subject} did not change beyond chance {where}: {detail}.", score)
    kind, verb = ("good", "rose") if direction > 0 else ("bad", "fell")
    return Finding(kind, f"{subject} {verb} {where} {detail}.", score)


def _direction(row: dict) -> int:
    """Returns +1 or -1 if the whole interval lies above or below 0, else 0."""
    low, high = row.get("ci95") or (0.0, 0.0)
    return (low > 0) - (high < 0)


def _listed(names: Iterable[str]) -> str:
    *others, last = [*names] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _trend(records: Sequence[dict], column: Column) -> Iterator[Finding]:
    """Compares the first and the last fifth of the logged values; their prompts differ, so chance is allowed for."""
    values = [record[column.name] for record in records if record.get(column.name) is not None]
    fifth = len(values) // 5
    if fifth < 2:
        return
    first, last = values[:fifth], values[-fifth:]
    change = fmean(last) - fmean(first)
    error = math.sqrt((stdev(first) ** 2 + stdev(last) ** 2) / fifth)
    if abs(change) <= 1.96 * error:
        kind, verb = "open", "did not clearly change"
    else:
        kind, verb = ("good", "rose") if change > 0 else ("bad", "fell")
    detail = f"{number(fmean(first))} in the first fifth of the records, {number(fmean(last))} in the last"
    yield Finding(kind, f"While training, {column.trend} {verb}: {detail}.")


def _warnings(records: Sequence[dict], columns: Sequence[Column]) -> Iterator[Finding]:
    """Yields a finding for numbers that are not finite, and for each sign of trouble that the columns describe."""
    broken = next((record for record in records if record.get("nonfinite")), None)
    if broken:
        names = ", ".join(broken["nonfinite"])
        yield Finding("bad", f"NaN or infinity first appeared at iteration {broken['iteration']}, in {names}.")
    for column in columns:
        value = _mean_at_end(records, column.name)
        for sign in column.signs:
            if value is not None and sign.when(value) and records[-1]["iteration"] >= sign.after:
                yield Finding("bad", sign.text.format(value))


def _mean_at_end(records: Sequence[dict], name: str) -> float | None:
    last = records[-max(1, len(records) // 5) :]
    values = [record[name] for record in last if isinstance(record.get(name), int | float)]
    return fmean(values) if values else None
