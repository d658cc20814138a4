"""Preference pairs: winner and loser that a judge has told apart, one denoising step each, kept as plain tensors.

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
    """x_t (R, N, C, H, W), R = 1 where winner and loser share it in all pairs; x_prev (2, N, C, H, W), winner first;
    step (N,) int64, index into the schedule; prompt (N,) int64, a row of this iteration's Conditioning; shared (N,)
    bool: whether winner and loser have the same x_t. eps_ref (G, R, N, C, H, W): what the reference predicts at x_t,
    where pairs are used again; else None."""

    x_t: Tensor = rows(1)
    x_prev: Tensor = rows(1)
    step: Tensor = rows()
    prompt: Tensor = rows()
    shared: Tensor = rows()
    eps_ref: Tensor | None = rows(2, default=None)

    @classmethod
    def of_step(cls, x_t: Tensor, x_prev: Tensor, chosen: Tensor, step: int) -> PreferencePairs:
        """One pair for each of B prompts, of the branches `chosen` (2, B), winner's first.

        x_t (K, B, C, H, W), or (1, B, C, H, W) where the branches share it, at `step`; x_prev (K, B, C, H, W) after it.
        """
        each = torch.arange(chosen.shape[1], device=chosen.device)
        shared = len(x_t) == 1
        x_t = x_t if shared else x_t[chosen, each]  # (R, B, C, H, W)
        return cls(
            x_t, x_prev[chosen, each], torch.full_like(each, step), each, torch.full_like(each, shared, dtype=bool)
        )

    def apart(self) -> PreferencePairs:
        """The same pairs with R = 2, winner and loser each having an x_t of its own to fill."""
        return replace(self, x_t=self.x_t.expand_as(self.x_prev))


def is_sure(scores: Tensor, chosen: Tensor, threshold: float) -> Tensor:
    """Where p(winner) - p(loser) > threshold: (B,) bool. scores (K, B); chosen (2, B), winner's and loser's branch.

    The p are softmax(s_winner, s_loser), so this says s_winner - s_loser > 2 atanh(threshold).
    """
    winner, loser = scores.gather(0, chosen)
    return winner - loser > 2 * math.atanh(threshold)


def balance(pairs: PreferencePairs, prompts: int, ranks: Ranks, rng: torch.Generator) -> PreferencePairs:
    """Equal shares of all ranks' pairs, drawn at random; every rank then takes the same number of optimizer steps.

    prompts: of an iteration, on each rank; rng has the same state on every rank. The pairs returned name their prompt
    among those of all ranks, in rank order: every rank knows them and has their embeddings, so these do not travel. A
    remainder smaller than the number of ranks is dropped, as published, and so is everything when there are fewer pairs
    than ranks.
    """
    if ranks.size == 1:
        return pairs.shuffle(rng)
    everyone = gather(replace(pairs, prompt=pairs.prompt + ranks.rank * prompts), ranks)
    each = len(everyone) // ranks.size
    return everyone.shuffle(rng)[ranks.rank * each : (ranks.rank + 1) * each]
