"""What the verdict checks in the course of a quantity: each function here returns a check, which a `Sign` carries.

A check takes what was logged, in order, and returns what its sentence names, or None where all is well. It is meant for
what is plain to see, a curve that has halved or stands beyond a level, and is silent about whatever a healthy curve's
noise may do. Changes that need a test against chance are a column's `trend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

Values = Sequence[float]
ByLabel = Mapping[int, Values]
LEAST = 3  # values in the first and in the last part of a course


def parts(values: Values) -> tuple[Values, Values]:
    """Returns the first and the last fifth of values (N,), of LEAST values at least; two halves where N is too small.

    N >= 1; a single value is both.
    """
    size = max(1, min(max(LEAST, len(values) // 5), len(values) // 2))
    return values[:size], values[-size:]


def ends_below(level: float) -> Callable[[Values], float | None]:
    """Returns the check for a mean of the last part below a level; it names the mean."""
    return lambda values: mean if (mean := fmean(parts(values)[1])) < level else None


def ends_above(level: float) -> Callable[[Values], float | None]:
    """Returns the check for a mean of the last part above a level; it names the mean."""
    return lambda values: mean if (mean := fmean(parts(values)[1])) > level else None


def stays_low(level: float) -> Callable[[Values], float | None]:
    """Returns the check for a second half whose mean is not above a level, or a last part wholly below it.

    It names the mean of either.
    """

    def check(values: Values) -> float | None:
        half, last = values[len(values) // 2 :], parts(values)[1]
        if fmean(half) <= level:
            return fmean(half)
        return fmean(last) if len(last) >= LEAST and max(last) < level else None

    return check


def falls_below(share: float) -> Callable[[Values], float | None]:
    """Returns the check for a last part whose mean is below this share of the first one's; it names the mean."""

    def check(values: Values) -> float | None:
        first, last = parts(values)
        return fmean(last) if len(last) >= LEAST and fmean(last) < share * fmean(first) else None

    return check


def falls_by(much: float) -> Callable[[Values], float | None]:
    """Returns the check for a last part whose mean is this much below the first one's; it names the fall."""

    def check(values: Values) -> float | None:
        first, last = parts(values)
        fall = fmean(first) - fmean(last)
        return fall if len(last) >= LEAST and fall > much else None

    return check


def grows(times: float) -> Callable[[Values], float | None]:
    """Returns the check for a last part whose median is this many times the first one's; it names the ratio."""

    def check(values: Values) -> float | None:
        first, last = map(median, parts(values))
        return last / first if len(values) >= 2 * LEAST and first > 0 and last > times * first else None

    return check


def of_several(check: Callable[[Values], float | None]) -> Callable[[Values], float | None]:
    """Returns the check that says nothing of fewer than LEAST values."""
    return lambda values: check(values) if len(values) >= LEAST else None


def spikes(times: float, share: float) -> Callable[[Values], int | None]:
    """Returns the check for repeated spikes; it names their number.

    A spike is a value of more than `times` the median of the up to 11 around it; LEAST of them are repeated, in a long
    run more: this share of the values.
    """

    def check(values: Values) -> int | None:
        around = [median(values[max(0, at - 5) : at + 6]) for at in range(len(values))]
        count = sum(value > times * level for value, level in zip(values, around, strict=True))
        return count if count >= max(LEAST, share * len(values)) else None

    return check


def repeats_at_end(times: int) -> Callable[[Values], int | None]:
    """Returns the check for a course that ends with `times` values or more that are not 0; it names their number."""

    def check(values: Values) -> int | None:
        count = next((place for place, value in enumerate(reversed(values)) if not value), len(values))
        return count if count >= times else None

    return check


def ends_with_some(values: Values) -> int | None:
    """Names the last of values that count from the run's beginning, if it is not 0."""
    return int(values[-1]) or None


def late_rows_empty(counts: ByLabel) -> str | None:
    """Names the last timesteps of a trajectory at which nothing was counted, "51 and 1"; counts: by t, noise first."""
    filled = [place for place, row in enumerate(counts.values()) if sum(row)]
    empty = [str(t) for t in list(counts)[max(filled) + 1 :]] if filled else []
    return listed(empty) or None


def early_rows_empty(least: int) -> Callable[[ByLabel], str | None]:
    """Returns the check for timesteps at which nothing was counted, and by no chance; it names them.

    A later one has `least`, or the timestep is in the first half and another has five times as many.
    """

    def check(counts: ByLabel) -> str | None:
        totals = [sum(row) for row in counts.values()]
        expected = [
            max(totals[place:]) >= least or (2 * place < len(totals) and max(totals) >= 5 * least)
            for place in range(len(totals))
        ]
        empty = [str(t) for t, total, some in zip(counts, totals, expected, strict=True) if some and not total]
        return listed(empty) or None

    return check


def label_ends_below(label: int, level: float) -> Callable[[ByLabel], float | None]:
    """Returns the check for a last value of one label below a level; it names the value."""
    return lambda lines: lines[label][-1] if lines.get(label) and lines[label][-1] < level else None


def labels_fall_back(points: float) -> Callable[[ByLabel], float | None]:
    """Returns the check for a mean over the labels that ends this far below its best; it names the fall."""

    def check(lines: ByLabel) -> float | None:
        means = [fmean(values) for values in zip(*filter(None, lines.values()), strict=False)]
        return max(means) - means[-1] if means and max(means) - means[-1] > points else None

    return check


def listed(names: Sequence[str]) -> str:
    """Writes names as a sentence has them: "a, b and c"; "" for none."""
    *others, last = [*names] or [""]
    return f"{', '.join(others)} and {last}" if others else last
