"""What a judge is asked to judge, and what a judge is.

Candidates are lazy: their predicted clean latents and images are computed when a judge asks for them, and a judge that
reads the noisy latents themselves costs neither a forward of the UNet nor a decode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..models.conditioning import Conditioning

LookAhead = Callable[[], tuple[Tensor | None, Tensor]]


class Candidates:
    """k branches of each of B prompts at one training timestep.

    x (K, B, C, H, W): their latents; t: the timestep they are at, 0 for clean ones.
    """

    def __init__(self, x: Tensor, t: float, look_ahead: LookAhead, decode: Callable[[Tensor], Tensor]):
        """look_ahead: gives (eps (G, K, B, C, H, W) at x, x0_hat); decode: latents to images, about [-1, 1]."""
        self.x, self.t = x, t
        self._look_ahead, self._decode = look_ahead, decode

    @property
    def x0_hat(self) -> Tensor:
        """Predicted clean latents (K, B, C, H, W)."""
        return self._ahead[1]

    @cached_property
    def images(self) -> Tensor:
        """Predicted clean images (K, B, 3, H, W), about [-1, 1]."""
        return self._decode(self.x0_hat)

    @property
    def eps(self) -> Tensor | None:
        """What the policy predicted at x, where looking ahead was asked for and x is noisy; else None."""
        return self._ahead[0] if "_ahead" in self.__dict__ else None

    @cached_property
    def _ahead(self) -> tuple[Tensor | None, Tensor]:
        return self._look_ahead()


class Judge(Protocol):
    """Prefers some candidates to others."""

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Scores (K, B), the higher the better; cond of the B prompts."""
