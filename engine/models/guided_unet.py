"""A frozen UNet as it is sampled: both guidance halves in one forward, with the exact savings of speed/.

It trains nothing and knows no LoRA; policy.py is the one with a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..config.training import ModelConfig
from ..speed.shared_halves import SharedHalves
from ..speed.text_kv import cached_text
from .conditioning import Conditioning
from .families.base import Family
from .families.find import family_of_unet


@dataclass(frozen=True, slots=True)
class Savings:
    """Settings that save work or memory and change the numbers only by rounding.

    unet_rows: most rows of one UNet forward while sampling; None means no limit. merge_lora: the LoRA is merged into
    the weights while sampling. share_halves: layers before the text are computed once for both guidance halves.
    multiple: in the update, latents are padded to a multiple of this, since a compiled UNet needs a fixed row count.
    """

    unet_rows: int | None = None
    merge_lora: bool = False
    share_halves: bool = False
    multiple: int = 1

    @classmethod
    def of(cls, model: ModelConfig, micro_batch: int) -> Savings:
        """Takes the settings of section `model`; micro_batch: pairs per forward of the update."""
        return cls(model.unet_rows, model.merges_lora, model.share_halves, micro_batch if model.compile == "all" else 1)


NO_SAVINGS = Savings()


class GuidedUNet:
    """UNet2DConditionModel without gradients. latent_shape: (C, h, w) of a latent."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latent_shape: tuple[int, int, int] | None = None,
        savings: Savings = NO_SAVINGS,
    ):
        """Freezes the UNet. latent_shape: (C, h, w) of a latent; None means the UNet's default resolution."""
        self.unet = unet.requires_grad_(False).eval()
        self.savings = savings
        self.is_sampling = False
        size = unet.config.sample_size
        self.latent_shape = latent_shape or (unet.config.in_channels, size, size)
        self._halves = SharedHalves(self.unet)

    @property
    def family(self) -> Family:
        """The base model's family, known by the UNet's configuration."""
        return family_of_unet(self.unet.config)

    def eps(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool = True) -> Tensor:
        """Computes the model output for both guidance halves in one forward.

        x (N, C, H, W); step_t (N,) training timesteps; cond of N prompts. Returns (2, N, C, H, W): without the prompt,
        with the prompt; (1, N, C, H, W) when not guided. Schedule combines the halves.
        """
        forward = self._eps_in_parts if self.is_sampling else self._eps_padded
        with self._halves.shared() if guided and self.savings.share_halves else nullcontext():
            return forward(x, step_t, cond, guided)

    def _eps_in_parts(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
        """Computes eps with at most savings.unet_rows rows in one forward."""
        max_latents = (self.savings.unet_rows or 0) // (2 if guided else 1)
        if max_latents == 0 or len(x) <= max_latents:
            return unet_eps(self.unet, x, step_t, cond, guided)
        parts = [slice(start, start + max_latents) for start in range(0, len(x), max_latents)]
        return torch.cat([unet_eps(self.unet, x[p], step_t[p], cond[p], guided) for p in parts], dim=1)

    def _eps_padded(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
        """Computes eps with the latents padded to a multiple of savings.multiple by copies of the last."""
        padding = -len(x) % self.savings.multiple
        if padding == 0:
            return unet_eps(self.unet, x, step_t, cond, guided)
        rows = torch.arange(len(x) + padding, device=x.device).clamp(max=len(x) - 1)
        return unet_eps(self.unet, x[rows], step_t[rows], cond[rows], guided)[:, : len(x)]

    @contextmanager
    def sampling(self, cond: Conditioning, text_kv: bool) -> Iterator[Conditioning]:
        """Opens a context to sample latents of the prompts of `cond`: no gradients, at most unet_rows rows a forward.

        It yields the Conditioning to sample with. text_kv: keys and values of its text are computed here once, if the
        UNet's layers allow it; its weights must then not change inside the context.
        """
        self.is_sampling = True
        try:
            with torch.no_grad(), self._merged():
                if not text_kv:
                    yield cond
                    return
                text = torch.cat([cond.null, cond.text])  # (1 + N, L, D)
                with cached_text(self.unet, text) as is_cached:
                    row = torch.arange(1, len(text), device=text.device)
                    yield replace(cond, row=row) if is_cached else cond
        finally:
            self.is_sampling = False

    def _merged(self) -> AbstractContextManager:
        """Opens a context in which the weights are those to sample with."""
        return nullcontext()


def unet_eps(unet: UNet2DConditionModel, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
    """Runs any UNet as GuidedUNet.eps does: one forward for both guidance halves, (2 or 1, N, C, H, W) in float32."""
    rows, step_t, text, added = unet_inputs(x, step_t, cond, guided)
    out = unet(rows, step_t, encoder_hidden_states=text, added_cond_kwargs=added).sample
    return out.float().unflatten(0, (-1, len(x)))


def unet_inputs(
    x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
    """Returns a UNet's rows, timesteps, text and added inputs for N latents: 2N if guided, without the prompt first."""
    halves = 2 if guided else 1
    if cond.row is None:
        text = both_halves(cond.null, cond.text, guided)
    else:  # each row's text among the cached ones
        text = both_halves(torch.zeros_like(cond.row[:1]), cond.row, guided)
    added = None
    if cond.pooled is not None:
        time_ids = cond.time_ids.expand(len(text), -1)
        added = {"text_embeds": both_halves(cond.null_pooled, cond.pooled, guided), "time_ids": time_ids}
    return x.repeat(halves, 1, 1, 1).to(cond.text.dtype), step_t.repeat(halves), text, added


def both_halves(null: Tensor, text: Tensor, guided: bool) -> Tensor:
    """Concatenates rows of the empty prompt and of the N prompts (2N, ...); only the latter (N, ...) if not guided."""
    return torch.cat([null.expand_as(text), text]) if guided else text
