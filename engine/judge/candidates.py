"""The candidates that a judge scores, and the Judge protocol.

Candidates are lazy: their predicted clean latents and images are computed when a judge asks for them, so a judge that
reads the noisy latents themselves costs neither a UNet forward nor a decode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Protocol

from torch import Tensor

from ..models.conditioning import Conditioning

LookAhead = Callable[[slice], tuple[Tensor | None, Tensor]]
ALL = slice(None)


class Candidates:
    """K branches of each of B prompts at one training timestep.

    x (K, B, C, H, W): latents; t: their training timestep, 0 for clean latents; drawn_at: that of the latents from
    which the last step drew them.
    """

    def __init__(
        self,
        x: Tensor,
        t: float,
        drawn_at: float,
        look_ahead: LookAhead,
        decode: Callable[[Tensor], Tensor],
        clock: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        """Takes look_ahead, which returns (eps (G, K, B, C, H, W) at x, x0_hat) of the prompts that a slice names, and
        decode: latents -> images. clock: times the two."""
        self.x, self.t, self.drawn_at = x, t, drawn_at
        self._look_ahead, self._decode, self._clock = look_ahead, decode, clock

    @property
    def x0_hat(self) -> Tensor:
        """Predicted clean latents (K, B, C, H, W)."""
        return self._predicted[1]

    @cached_property
    def images(self) -> Tensor:
        """Predicted clean images (K, B, 3, H, W), about [-1, 1]."""
        x0_hat = self.x0_hat
        with self._clock("rollout/decode"):
            return self._decode(x0_hat)

    @property
    def eps(self) -> Tensor | None:
        """The policy's prediction at x if x is noisy and `x0_hat` or `images` was asked for; otherwise None."""
        return self._predicted[0] if "_predicted" in self.__dict__ else None

    @cached_property
    def _predicted(self) -> tuple[Tensor | None, Tensor]:
        with self._clock("rollout/branches"):
            return self._look_ahead(ALL)

    def first(self, prompts: int) -> Candidates:
        """Returns those of the first prompts, with what is known of them; what is asked of them changes nothing here.

        They have no clock: what they compute is timed as a part of the stage in which it is asked for.
        """
        some = slice(prompts)
        part = Candidates(self.x[:, some], self.t, self.drawn_at, lambda _: self._look_ahead(some), self._decode)
        if "_predicted" in self.__dict__:
            eps, x0_hat = self._predicted
            part._predicted = None if eps is None else eps[:, :, some], x0_hat[:, some]
        if "images" in self.__dict__:
            part.images = self.images[:, some]
        return part


class Judge(Protocol):
    """A judge scores candidates."""

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Returns scores (K, B), higher is better; cond: the Conditioning of the B prompts."""
