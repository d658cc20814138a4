"""How sure the judge must be of a pair at each step: alike, rising with the noise, or so that a share is kept.

A threshold is a difference of probabilities, p(winner) - p(loser), above which a pair is trained on (pairs.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...config.methods.spo import RolloutConfig
from ...schedules.schedule import Schedule

BELOW_ONE = 1 - 1e-15


def given_thresholds(config: RolloutConfig, schedule: Schedule) -> list[float]:
    """Returns the threshold of each step (T,): rollout.threshold, or from there to rollout.threshold_noisiest.

    It rises linearly in the standard deviation of the steps, from the last to the first. Source: LPO's released code,
    which has these deviations to four digits.
    """
    low, high = config.threshold, config.threshold_noisiest
    steps = schedule.num_steps
    if high is None:
        return [config.threshold] * steps
    sigma = schedule.sigma(torch.arange(steps, device=schedule.device)).double().tolist()  # one wait a run
    span = sigma[0] - sigma[-1]
    return [low + (high - low) * ((each - sigma[-1]) / span if span else 0.0) for each in sigma]


def keeping_thresholds(
    gaps: Tensor, segments: Sequence[range], share: float, by_timestep: bool, steps: int
) -> list[float]:
    """Returns the threshold of each step (T,) above which a share of the pairs lies.

    gaps (S, N): score(winner) - score(loser) of N pairs of each judged segment; those that are not finite do not count.
    by_timestep: whether the share is kept of every segment, or of all together.
    """
    thresholds = [0.0] * steps
    every = _quantile(gaps, share)
    for segment, row in zip(segments, gaps, strict=True):
        for step in segment:
            thresholds[step] = _quantile(row, share) if by_timestep else every
    return thresholds


def threshold_line(thresholds: Sequence[float], segments: Sequence[range], share: float, pairs: int) -> str:
    """Returns what a run says of thresholds that keep a share of so many pairs."""
    found = [thresholds[segment.start] for segment in segments]
    low, high = min(found), max(found)
    span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g} by timestep"
    return f"threshold {span}, which keeps {share:.0%} of {pairs:,} pairs of the base model"


def _quantile(gaps: Tensor, share: float) -> float:
    """Returns the threshold above which this share of the finite gaps lies."""
    finite = gaps[gaps.isfinite()].double().sort(descending=True).values.tolist()  # one wait a run
    kept = round(share * len(finite))
    return min(math.tanh(max(finite[kept], 0.0) / 2), BELOW_ONE) if kept < len(finite) else 0.0
