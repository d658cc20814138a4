"""Preference pairs: winner and loser drawn from one noisy latent, kept as plain tensors.

A pair names its prompt by number, so that text embeddings are stored and exchanged once per prompt, not once per pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """x_t (R, N, C, H, W), R = 1 when winner and loser share it; x_prev (2, N, C, H, W), winner first;
    step (N,) int64, index into the schedule; prompt (N,) int64, a row of this iteration's Conditioning."""

    x_t: Tensor
    x_prev: Tensor
    step: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows: Tensor | slice) -> PreferencePairs:
        return PreferencePairs(self.x_t[:, rows], self.x_prev[:, rows], self.step[rows], self.prompt[rows])

    @classmethod
    def cat(cls, parts: Sequence[PreferencePairs]) -> PreferencePairs:
        """One after the other; all parts have the same R."""
        return cls(
            torch.cat([p.x_t for p in parts], dim=1),
            torch.cat([p.x_prev for p in parts], dim=1),
            torch.cat([p.step for p in parts]),
            torch.cat([p.prompt for p in parts]),
        )

    def shuffle(self, rng: torch.Generator) -> PreferencePairs:
        return self[torch.randperm(len(self), generator=rng, device=self.step.device)]

    def split(self, size: int) -> Iterator[PreferencePairs]:
        """Batches of `size` pairs in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
