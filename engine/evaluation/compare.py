"""Before and after in numbers: differences with their 95% intervals, and whether they are more than chance.

An interval is given only from ENOUGH prompts on, and a change is claimed only when its p-value stays below 0.05 after
Holm's correction for all scores of the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from scipy.special import ndtr, stdtr, stdtrit
from torch import Tensor

from .intervals import ENOUGH, SURE, Z, binomial_p, corrected, wilson


def paired_delta(base: Tensor | Sequence[float], tuned: Tensor | Sequence[float]) -> dict:
    """Returns the means of base (N,) and tuned (N,), their difference, its 95% interval and its two-sided p-value.

    Entry n of both belongs to one prompt. Scores that are all 0 or 1 are rates: the interval is that of Bonett and
    Price (2012), with one answer added to each kind of change, and p is McNemar's exact one. Else both are Student's,
    of the differences. ci95 and p are None below ENOUGH pairs, and ci95 where all differences are alike, which tells
    nothing of how much others would differ. ValueError unless both are (N,) with N >= 1.
    """
    base, tuned = (torch.as_tensor(scores).detach().to("cpu", torch.float64) for scores in (base, tuned))
    if base.shape != tuned.shape or base.dim() != 1 or not len(base):
        raise ValueError(f"paired scores need one shape (N,), N >= 1, got {tuple(base.shape)} and {tuple(tuned.shape)}")
    difference = tuned - base
    row = {"base": base.mean().item(), "tuned": tuned.mean().item(), "delta": difference.mean().item(), "n": len(base)}
    if len(base) < ENOUGH:
        return row | {"ci95": None, "p": None}
    if all(((scores == 0) | (scores == 1)).all() for scores in (base, tuned)):
        gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return row | {"ci95": _paired_rates(gained, lost, len(base)), "p": binomial_p(gained, gained + lost)}
    return row | _student(row["delta"], difference.std().item(), len(base))


def rate_delta(before: float, after: float, count: int) -> dict:
    """Computes two rates of right answers to the same `count` questions, their difference, its interval and p-value.

    The two are taken for independent, which gives a wider interval than paired answers that agree more often than by
    chance: the interval is Newcombe's (1998), of Wilson's for each rate, and p that of the pooled score test. Both are
    None below ENOUGH questions.
    """
    delta = after - before
    row = {"base": before, "tuned": after, "delta": delta, "n": count}
    if count < ENOUGH:
        return row | {"ci95": None, "p": None}
    (low, high), (low_after, high_after) = wilson(before, count), wilson(after, count)
    interval = [
        delta - math.hypot(after - low_after, high - before),
        delta + math.hypot(high_after - after, before - low),
    ]
    pooled = (before + after) / 2
    error = math.sqrt(2 * pooled * (1 - pooled) / count)
    return row | {"ci95": interval, "p": 2 * float(ndtr(-abs(delta) / error)) if error else 1.0}


def two_means(first: Sequence[float], last: Sequence[float]) -> float:
    """Returns Welch's two-sided p-value of a difference of the means of independent values; 1 where neither varies."""
    first, last = (torch.as_tensor(values, dtype=torch.float64) for values in (first, last))
    errors = [values.var().item() / len(values) for values in (first, last)]
    if not sum(errors):
        return 1.0
    freedom = sum(errors) ** 2 / sum(e * e / (len(v) - 1) for e, v in zip(errors, (first, last), strict=True))
    return 2 * float(stdtr(freedom, -abs((last.mean() - first.mean()).item()) / math.sqrt(sum(errors))))


def beyond_chance(rows: Mapping[str, dict]) -> dict[str, int]:
    """Returns by score what can be said of its change: +1 it rose, -1 it fell, 0 neither is shown.

    rows: of paired_delta or rate_delta; their p-values are corrected together (Holm). A row without p is 0.
    """
    adjusted = corrected(rows)
    return {
        name: int(math.copysign(1, row["delta"])) if row.get("delta") and adjusted.get(name, 1.0) < SURE else 0
        for name, row in rows.items()
    }


def _student(delta: float, deviation: float, count: int) -> dict:
    if not deviation:
        return {"ci95": None, "p": None if delta else 1.0}
    error = deviation / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.975)) * error
    return {"ci95": [delta - half, delta + half], "p": 2 * float(stdtr(count - 1, -abs(delta) / error))}


def _paired_rates(gained: int, lost: int, count: int) -> list[float]:
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return [max(-1.0, up - down - half), min(1.0, up - down + half)]
