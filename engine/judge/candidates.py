"""The candidates that a judge scores, and the Judge protocol.

Candidates are lazy: their predicted clean latents and images are computed when a judge asks for them, so a judge that
reads the noisy latents themselves costs neither a UNet forward nor a decode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..models.conditioning import Conditioning

LookAhead = Callable[[], tuple[Tensor | None, Tensor]]


class Candidates:
    """K branches of each of B prompts at one training timestep.

    x (K, B, C, H, W): latents; t: their training timestep, 0 for clean latents; drawn_at: that of the latents from
    which the last step drew them.
    """

    def __init__(self, x: Tensor, t: float, drawn_at: float, look_ahead: LookAhead, decode: Callable[[Tensor], Tensor]):
        """Takes look_ahead, which returns (eps (G, K, B, C, H, W) at x, x0_hat), and decode: latents -> images."""
        self.x, self.t, self.drawn_at = x, t, drawn_at
        self._look_ahead, self._decode = look_ahead, decode

    @property
    def x0_hat(self) -> Tensor:
        """Predicted clean latents (K, B, C, H, W)."""
        return self._predicted[1]

    @cached_property
    def images(self) -> Tensor:
        """Predicted clean images (K, B, 3, H, W), about [-1, 1]."""
        return self._decode(self.x0_hat)

    @property
    def eps(self) -> Tensor | None:
        """The policy's prediction at x if x is noisy and `x0_hat` or `images` was asked for; otherwise None."""
        return self._predicted[0] if "_predicted" in self.__dict__ else None

    @cached_property
    def _predicted(self) -> tuple[Tensor | None, Tensor]:
        return self._look_ahead()


class Judge(Protocol):
    """A judge scores candidates."""

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Returns scores (K, B), higher is better; cond: the Conditioning of the B prompts."""
