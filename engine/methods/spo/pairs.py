"""Preference pairs: a winner and a loser by the judge, of one denoising step each, as plain tensors.

A pair names its prompt by number, so that text embeddings are stored and exchanged once per prompt, not once per pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...rows import Rows, rows
from ...runtime.ranks import Ranks, gather


@dataclass(frozen=True, slots=True)
class PreferencePairs(Rows):
    """N pairs of an iteration.

    x_t (R, N, C, H, W): R = 1 where winner and loser share it in all pairs; x_prev (2, N, C, H, W): winner first;
    step (N,) int64: index into the schedule; prompt (N,) int64: row of the iteration's Conditioning; shared (N,) bool:
    whether winner and loser have the same x_t; eps_ref (G, R, N, C, H, W): the reference's prediction at x_t, or None;
    gap (N,): score(winner) - score(loser), or None.
    """

    x_t: Tensor = rows(1)
    x_prev: Tensor = rows(1)
    step: Tensor = rows()
    prompt: Tensor = rows()
    shared: Tensor = rows()
    eps_ref: Tensor | None = rows(2, default=None)
    gap: Tensor | None = rows(default=None)

    @classmethod
    def of_step(
        cls, x_t: Tensor, x_prev: Tensor, chosen: Tensor, step: int, gap: Tensor | None = None
    ) -> PreferencePairs:
        """Makes one pair for each of B prompts of the branches `chosen` (2, B), the winner's first.

        x_t (K, B, C, H, W), or (1, B, C, H, W) where the branches share it, at `step`; x_prev (K, B, C, H, W) after it;
        gap (B,).
        """
        prompts = torch.arange(chosen.shape[1], device=chosen.device)
        shared = len(x_t) == 1
        x_t = x_t if shared else x_t[chosen, prompts]  # (R, B, C, H, W)
        steps, shared = torch.full_like(prompts, step), torch.full_like(prompts, shared, dtype=bool)
        return cls(x_t, x_prev[chosen, prompts], steps, prompts, shared, gap=gap)

    def surest(self, count: int) -> PreferencePairs:
        """Returns the `count` pairs with the largest gaps, in the order in which they are."""
        return self[self.gap.topk(count).indices.sort().values]

    def apart(self) -> PreferencePairs:
        """Returns the pairs with R = 2, in which winner and loser each have an x_t."""
        return replace(self, x_t=self.x_t.expand_as(self.x_prev))


def is_sure(scores: Tensor, chosen: Tensor, threshold: float) -> Tensor:
    """Returns whether p(winner) - p(loser) > threshold: (B,) bool. scores (K, B); chosen (2, B): winner's branch first.

    The p are softmax(s_winner, s_loser), so this says s_winner - s_loser > 2 atanh(threshold). Of scores that are not
    finite nothing is sure.
    """
    winner, loser = scores.gather(0, chosen)
    return (winner - loser > 2 * math.atanh(threshold)) & (winner - loser).isfinite()


def balance(pairs: PreferencePairs, prompts: int, ranks: Ranks, rng: torch.Generator) -> PreferencePairs:
    """Draws equally many of all ranks' pairs for each rank, so that all take the same number of optimizer steps.

    prompts: of an iteration, on each rank; rng has the same state on every rank. The pairs returned name their prompt
    among those of all ranks, in rank order: every rank knows them and has their embeddings, so these do not travel. A
    remainder smaller than the number of ranks is dropped, as published, and so is everything when there are fewer pairs
    than ranks.
    """
    if ranks.size == 1:
        return pairs.shuffle(rng)
    everyone = gather(replace(pairs, prompt=pairs.prompt + ranks.rank * prompts), ranks)
    per_rank = len(everyone) // ranks.size
    return everyone.shuffle(rng)[ranks.rank * per_rank : (ranks.rank + 1) * per_rank]
