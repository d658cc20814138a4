"""What the halves of a guided forward have in common, computed once: all that lies before the first cross-attention.

The halves have the same latents and timesteps and differ by their text alone, which a UNet without further inputs first
sees in a cross-attention; until there the second half would repeat the first. A UNet that also takes pooled text shares
nothing, as that is part of the timestep's embedding. The numbers are the same but for rounding, gradients too. Only
modules are known here; who puts the halves side by side is policy.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class SharedHalves:
    """Hooks on a UNet's modules that see no text; they do nothing outside of `shared`."""

    def __init__(self, unet: nn.Module):
        """unet: diffusers' UNet2DConditionModel."""
        self._unet = unet
        self._on = False
        for module in before_text(unet):
            module.register_forward_pre_hook(self._halve, with_kwargs=True)
            module.register_forward_hook(self._double)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the second half of the rows of each forward is the first again, but for the text.

        Not where activations are computed again in the backward pass, which is then no longer inside.
        """
        self._on = not (torch.is_grad_enabled() and self._unet.is_gradient_checkpointing)
        try:
            yield
        finally:
            self._on = False

    def _halve(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return tree_map_only(Tensor, first_half, (args, kwargs)) if self._on else None

    def _double(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        return tree_map_only(Tensor, twice, output) if self._on else None


def before_text(unet: nn.Module) -> list[nn.Module]:
    """What a UNet does to its rows before any text, one module after the other, norms and projections left out.

    It ends at the first block that is not one of SD-1.5's: that may see the text in another place.
    """
    if type(unet) is not UNet2DConditionModel or unet.config.addition_embed_type is not None:
        return []
    found = [unet.conv_in]
    for block in unet.down_blocks:
        if type(block) is not DownBlock2D:
            return [*found, *before_text_of(block)]
        found.append(block)
    return found


def before_text_of(block: nn.Module) -> list[nn.Module]:
    """As before_text, of a block of the way down that may see the text."""
    if type(block) is not CrossAttnDownBlock2D or type(block.attentions[0]) is not Transformer2DModel:
        return []
    first = block.attentions[0].transformer_blocks[0]
    if type(first) is not BasicTransformerBlock or first.only_cross_attention:
        return []
    return [block.resnets[0], first.attn1]


def first_half(rows: Tensor) -> Tensor:
    """(2N, ...) -> (N, ...)"""
    return rows[: len(rows) // 2]


def twice(rows: Tensor) -> Tensor:
    """(N, ...) -> (2N, ...)"""
    return torch.cat([rows, rows])
