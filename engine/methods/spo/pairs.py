"""Preference pairs: winner and loser that a judge has told apart, one denoising step each, kept as plain tensors.

A pair names its prompt by number, so that text embeddings are stored and exchanged once per prompt, not once per pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.ranks import Ranks, gather_rows


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """x_t (R, N, C, H, W), R = 1 when winner and loser share it; x_prev (2, N, C, H, W), winner first;
    step (N,) int64, index into the schedule; prompt (N,) int64, a row of this iteration's Conditioning.
    eps_ref (G, R, N, C, H, W): what the reference predicts at x_t, where pairs are used again; else None."""

    x_t: Tensor
    x_prev: Tensor
    step: Tensor
    prompt: Tensor
    eps_ref: Tensor | None = None

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows: Tensor | slice) -> PreferencePairs:
        eps_ref = None if self.eps_ref is None else self.eps_ref[:, :, rows]
        return PreferencePairs(self.x_t[:, rows], self.x_prev[:, rows], self.step[rows], self.prompt[rows], eps_ref)

    @classmethod
    def of_step(cls, x_t: Tensor, x_prev: Tensor, chosen: Tensor, step: int) -> PreferencePairs:
        """One pair for each of B prompts, of the branches `chosen` (2, B), winner's first.

        x_t (K, B, C, H, W), or (1, B, C, H, W) when the branches share it, at `step`; x_prev (K, B, C, H, W) after it.
        """
        rows = torch.arange(chosen.shape[1], device=chosen.device)
        own = x_t if len(x_t) == 1 else x_t[chosen, rows]  # (R, B, C, H, W)
        return cls(own, x_prev[chosen, rows], torch.full_like(rows, step), rows)

    @classmethod
    def cat(cls, parts: Sequence[PreferencePairs]) -> PreferencePairs:
        """One after the other; all parts have the same R, and all or none have eps_ref."""
        return cls(
            torch.cat([p.x_t for p in parts], dim=1),
            torch.cat([p.x_prev for p in parts], dim=1),
            torch.cat([p.step for p in parts]),
            torch.cat([p.prompt for p in parts]),
            None if parts[0].eps_ref is None else torch.cat([p.eps_ref for p in parts], dim=2),
        )

    def shuffle(self, rng: torch.Generator) -> PreferencePairs:
        return self[torch.randperm(len(self), generator=rng, device=self.step.device)]

    def split(self, size: int) -> Iterator[PreferencePairs]:
        """Batches of `size` pairs in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


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
    everyone = PreferencePairs(
        x_t=gather_rows(pairs.x_t.transpose(0, 1), ranks).transpose(0, 1),
        x_prev=gather_rows(pairs.x_prev.transpose(0, 1), ranks).transpose(0, 1),
        step=gather_rows(pairs.step, ranks),
        prompt=gather_rows(pairs.prompt + ranks.rank * prompts, ranks),
    )
    each = len(everyone) // ranks.size
    return everyone.shuffle(rng)[slice(ranks.rank * each, (ranks.rank + 1) * each)]
