"""Draws the random numbers of a rollout, from a torch.Generator or from a recording.

Wherever a rollout takes `rng`, it takes either of the two. Nothing else in strop uses this module.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Replay:
    """Recorded draws, used in place of a generator in the order of their recording; `len(replay)` are left."""

    def __init__(self, draws: Iterable[Tensor]):
        """Takes floating-point tensors for normal draws, integer tensors for choices, in the order of the rollout."""
        self.draws = list(draws)

    def __len__(self) -> int:
        return len(self.draws)

    def next(self, shape: tuple[int, ...], floating: bool) -> Tensor:
        """Returns the next recorded draw in this shape. Raises ValueError if its kind or size differs or none is left.

        A recording may group the same numbers otherwise: (K, B, ...) where (K * B, ...) is asked for.
        """
        if not self.draws:
            raise ValueError(f"no recorded draw is left for {shape}")
        value = self.draws.pop(0)
        if value.is_floating_point() != floating or value.numel() != torch.Size(shape).numel():
            raise ValueError(f"the next recorded draw is {value.dtype} {tuple(value.shape)}, asked for {shape}")
        return value.reshape(shape)


Rng = torch.Generator | Replay


def normal(shape: tuple[int, ...], rng: torch.Generator | Replay, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draws standard normal numbers of this shape."""
    if isinstance(rng, Replay):
        return rng.next(shape, floating=True).to(device, dtype)
    return torch.randn(shape, generator=rng, device=device, dtype=dtype)


def integers(high: int, count: int, rng: torch.Generator | Replay, device: torch.device) -> Tensor:
    """Draws `count` integers uniformly from 0..high-1: (count,) int64."""
    if isinstance(rng, Replay):
        return rng.next((count,), floating=False).to(device)
    return torch.randint(0, high, (count,), generator=rng, device=device)
