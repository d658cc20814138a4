"""Computes differences between base and tuned model with their 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def paired_delta(base: Tensor | Sequence[float], tuned: Tensor | Sequence[float]) -> dict:
    """Returns the means of base (N,) and tuned (N,), their difference and its 95% interval.

    Entry n of both belongs to one prompt.
    With d = tuned - base: delta = mean(d), ci95 = delta -+ 1.96 * sd(d) / sqrt(N), sd with N - 1 in the denominator
    (normal approximation). One pair alone has no interval: ci95 is None. ValueError unless both are (N,) with N >= 1.
    """
    base, tuned = (torch.as_tensor(scores).detach().to("cpu", torch.float64) for scores in (base, tuned))
    if base.shape != tuned.shape or base.dim() != 1 or not len(base):
        raise ValueError(f"paired scores need one shape (N,), N >= 1, got {tuple(base.shape)} and {tuple(tuned.shape)}")
    difference = tuned - base
    delta = difference.mean().item()
    interval = None
    if len(base) > 1:
        half = 1.96 * difference.std().item() / math.sqrt(len(base))
        interval = [delta - half, delta + half]
    return {"base": base.mean().item(), "tuned": tuned.mean().item(), "delta": delta, "ci95": interval}


def rate_delta(before: float, after: float, count: int) -> dict:
    """Returns two rates of right answers to the same `count` questions, their difference and its 95% interval.

    The interval takes the two for independent (normal approximation), which is wider than that of paired answers that
    agree more often than by chance. None where there is no question.
    """
    variance = before * (1 - before) + after * (1 - after)
    half = 1.96 * math.sqrt(variance / count) if count else 0.0
    delta = after - before
    return {"base": before, "tuned": after, "delta": delta, "ci95": [delta - half, delta + half] if count else None}
