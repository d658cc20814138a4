"""How far raters agree: Krippendorff's alpha for ordinal answers."""

from __future__ import annotations

import numpy as np


def ordinal_alpha(values: np.ndarray) -> float | None:
    """Returns Krippendorff's alpha of values (R raters, U units), NaN where a rater did not answer.

    1 is agreement, 0 what chance gives. Two answers c < k differ by the square of the number of answers from c to k,
    those at both ends counted half (Krippendorff, 2011). None where no unit has two answers or all answers are one.
    """
    levels = np.unique(values[np.isfinite(values)])
    counts = np.stack([(values == level).sum(0) for level in levels], axis=1) if len(levels) else np.zeros((0, 0))
    counts = counts[counts.sum(1) >= 2].astype(np.float64)  # (U, C): a unit with one answer has nothing to compare
    if len(levels) < 2 or not len(counts):
        return None
    answers = counts.sum(1, keepdims=True)
    coincidences = (counts / (answers - 1)).T @ counts - np.diag((counts / (answers - 1)).sum(0))  # (C, C)
    totals = coincidences.sum(1)
    before = np.cumsum(totals) - totals / 2
    distance = (before[:, None] - before[None, :]) ** 2
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distance).sum() / expected) if expected > 0 else None
