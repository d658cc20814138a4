"""Says what the numbers of a run mean, in sentences that a person can act on.

A change is claimed only where it is beyond chance: the p-values of all held-out scores and of the trends while training
are corrected together. Of a run with fewer iterations than SHORT nothing is claimed, however small its p-values. The
signs of trouble are those that the columns of the run's method describe. What has no value is said to be not measured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from ..evaluation.compare import beyond_chance, two_means
from ..evaluation.intervals import ENOUGH
from ..evaluation.monitor import PICKSCORE
from ..runtime.columns import SHORT, Column, Heatmap
from ..runtime.signs import LEAST, listed, parts
from .run import Run

NOT_MEASURED = "not measured"
FEW, ALIKE = "too few to say", "all changes alike"
ONLY_THE_JUDGE = "The run was measured only by the judge, which is no independent witness."
NO_WITNESS = "pickscore is not independent: judges are trained from PickScore."


class Finding(NamedTuple):
    """One sentence of the verdict; heldout: the held-out score whose change it claims, "" if it claims none."""

    kind: Literal["good", "bad", "open"]
    text: str
    heldout: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """headline: the findings in two or three sentences. directions: +1, -1 or 0 by held-out score, as claimed."""

    headline: str
    findings: tuple[Finding, ...]
    directions: Mapping[str, int]


def verdict(run: Run) -> Verdict:
    """Returns what the records and the summary of a run show; the summary of an unfinished run is {}."""
    compared, trends = run.compared, dict(_trends(run))
    directions = beyond_chance(compared | {name: row for rows in trends.values() for name, row in rows.items()})
    if run.short:
        directions = dict.fromkeys(directions, 0)
    findings = [
        *_closing(run, directions),
        *_independent(run, directions),
        *(finding for column, rows in trends.items() for finding in _trend(column, rows, directions)),
        *_signs(run),
    ]
    return Verdict(_headline(run, findings), tuple(findings), {name: directions[name] for name in compared})


def number(value: float | None, sign: str = "") -> str:
    """Writes a number with three decimals, a small one with two digits; sign "+" puts it before positive numbers."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:{sign}.2g}" if 0 < abs(value) < 0.00995 else f"{value:{sign},.3f}"


def interval(row: dict) -> str:
    """Returns the 95% interval of a held-out comparison as text, or why there is none."""
    if row.get("ci95"):
        return " to ".join(number(bound, "+") for bound in row["ci95"])
    if row.get("n") is None or row.get("delta") is None:
        return NOT_MEASURED
    return FEW if row["n"] < ENOUGH else ALIKE


def _headline(run: Run, findings: Sequence[Finding]) -> str:
    """Sums up: which scores rose or fell, by what else than the judge, and whether there are warning signs."""
    rose, fell = (listed([f.heldout for f in findings if f.heldout and f.kind == kind]) for kind in ("good", "bad"))
    rows, where = run.compared.values(), f"held-out {run.heldout}"
    if run.short:
        first = f"Too short to judge: from fewer than {SHORT} iterations nothing is concluded, and this run has "
        first += f"{run.iterations}."
    elif rose or fell:
        changes = [f"{names} {verb}" for names, verb in ((rose, "rose"), (fell, "fell")) if names]
        first = f"On {where} {', but '.join(changes)}, beyond chance."
    elif not any(row.get("delta") is not None for row in rows):
        first = f"Whether the tuned model is better on {where} was {NOT_MEASURED}."
    elif any(row.get("p") is not None for row in rows):
        first = f"No change beyond chance was measured on {where}."
    elif all(interval(row) == FEW for row in rows):
        first = f"Too few {where} to say whether anything changed: fewer than {ENOUGH}."
    else:
        first = f"Whether anything changed beyond chance on {where} was not tested."
    measured = "" if not rows or run.independent or run.trains_judge else f" {ONLY_THE_JUDGE}"
    warned = any(finding.kind == "bad" for finding in findings)
    signs = " There are warning signs." if warned else " There are no warning signs."
    return first + measured + (signs if warned or (run.records and not run.short) else "")


def _closing(run: Run, directions: Mapping[str, int]) -> Iterator[Finding]:
    for name, row in run.compared.items():
        yield _comparison(name, row, run, directions[name])
    if not run.summary:
        reached = f"logged iteration {run.iterations}" if run.records else "logged nothing"
        yield Finding("open", f"The run is not finished: it has {reached} so far. Held-out scores are {NOT_MEASURED}.")
    elif not run.compared:
        yield Finding("open", f"Held-out scores are {NOT_MEASURED}.")
    if run.summary.get("optimizer_steps") == 0:
        yield Finding("bad", "No optimizer step was made, so that nothing was learned: look at optim.accumulate.")
    if run.short:
        yield Finding("open", f"Too short to judge: the run has {run.iterations} iterations, fewer than {SHORT}.")


def _comparison(name: str, row: dict, run: Run, direction: int) -> Finding:
    count = run.summary.get(f"heldout_{run.heldout}")
    where = f"on {f'{count:,} ' if count else ''}held-out {run.heldout}"
    score = _named(name)
    subject = score[:1].upper() + score[1:]
    if row.get("delta") is None:
        return Finding("open", f"{subject} {where} is {NOT_MEASURED}.")
    detail = f"from {number(row.get('base'))} to {number(row.get('tuned'))}, by {number(row['delta'], '+')}"
    detail += f" (95% interval {interval(row)})" if row.get("ci95") else f" ({interval(row)})"
    if direction:
        kind, verb = ("good", "rose") if direction > 0 else ("bad", "fell")
        return Finding(kind, f"{subject} {verb} {where} {detail}.", score)
    if run.short or interval(row) == FEW:
        return Finding("open", f"{subject} went {detail} {where}.")
    if row.get("p") is None:
        return Finding("open", f"{subject} went {detail} {where}; whether that is beyond chance was not tested.")
    return Finding("open", f"{subject} did not change beyond chance {where}: {detail}.")


def _independent(run: Run, directions: Mapping[str, int]) -> Iterator[Finding]:
    """Says which scores are not the judge's, and warns where only the judge was pleased."""
    if run.trains_judge or not run.compared:
        return
    if PICKSCORE in run.compared:
        yield Finding("open", NO_WITNESS)
    if rewards := run.summary.get("rewards"):
        verb = "is" if len(rewards) == 1 else "are"
        yield Finding(
            "open", f"{listed(rewards)} {verb} what the policy was rewarded by, and no proof of anything else."
        )
    if not run.independent:
        yield Finding("open", ONLY_THE_JUDGE)
        return
    names, verb = listed(run.independent), "is" if len(run.independent) == 1 else "are"
    yield Finding("open", f"{names[:1].upper()}{names[1:]} {verb} measured independently of the judge.")
    others = [name for name in run.independent if name != "alignment"]
    if directions.get("judge", 0) > 0 and others and all(directions[name] <= 0 for name in others):
        text = f"The judge's score rose but {listed(others)} did not"
        yield Finding("bad", f"{text}: the policy may have learned to please the judge and nothing else.")


def _trends(run: Run) -> Iterator[tuple[Column, dict[str, dict]]]:
    """Yields the columns with a trend, and two tests of each: of the last fifth against the first and the middle one.

    Prompts differ from record to record, so the values are taken for independent. The tests have the form of held-out
    comparisons; there are none with fewer than LEAST values a side.
    """
    for column in run.columns if run.records else ():
        values = [record[column.name] for record in run.records if record.get(column.name) is not None]
        if column.trend is None or len(values) < 2 * LEAST:
            continue
        first, last = parts(values)
        start = (len(values) - len(first)) // 2
        sides = {"while training": first}
        if len(values) >= 3 * LEAST:
            sides["after its middle"] = values[start : start + len(first)]
        yield column, {f"{column.name} {when}": _test(side, last) for when, side in sides.items()}


def _test(before: Sequence[float], after: Sequence[float]) -> dict:
    base, tuned = fmean(before), fmean(after)
    return {"base": base, "tuned": tuned, "delta": tuned - base, "n": len(after), "p": two_means(before, after)}


def _trend(column: Column, rows: Mapping[str, dict], directions: Mapping[str, int]) -> Iterator[Finding]:
    name, better = column.trend.name, 1 if column.trend.better == "up" else -1
    (test, row), *after_middle = rows.items()
    verb = {0: "did not change beyond chance", 1: "rose", -1: "fell"}
    kind = {0: "open", better: "good", -better: "bad"}
    detail = f"{number(row['base'])} in the first {row['n']} records, {number(row['tuned'])} in the last {row['n']}"
    yield Finding(kind[directions[test]], f"While training, {name} {verb[directions[test]]}: {detail}.")
    for later, row in after_middle:
        if directions[later] == -better != directions[test]:
            detail = (
                f"{number(row['base'])} in the {row['n']} records of the middle, {number(row['tuned'])} in the last"
            )
            yield Finding("bad", f"After the middle of the training, {name} {verb[-better]}: {detail}.")


def _signs(run: Run) -> Iterator[Finding]:
    """Yields a finding for numbers that are not finite, and for each sign that the columns describe and that shows."""
    broken = next((record for record in run.records if record.get("nonfinite")), None)
    if broken:
        names = ", ".join(broken["nonfinite"])
        yield Finding("bad", f"NaN or infinity first appeared at iteration {broken['iteration']}, in {names}.")
    for column in run.columns:
        course = _course(run, column)
        for sign in column.signs if course else ():
            shown = sign.check(course) if run.iterations >= sign.after else None
            if shown is not None:
                yield Finding("open" if sign.normal else "bad", sign.text.format(shown))


def _course(run: Run, column: Column) -> list[float] | dict[int | str, list[float]]:
    """Returns what a column's signs check: the logged values, or those of each label; {} or [] where there are none."""
    logged = [record[column.name] for record in run.records if record.get(column.name) is not None]
    if not logged or not isinstance(logged[0], dict):
        return logged
    labels = run.judged_timesteps if isinstance(column.drawn, Heatmap) else logged[0]
    values = {str(label): [each[str(label)] for each in logged if each.get(str(label)) is not None] for label in labels}
    return {int(label) if label.isdecimal() else label: line for label, line in values.items()}


def _named(score: str) -> str:
    return "the judge's score" if score == "judge" else score
