"""Computes the layers before the first cross-attention once for both guidance halves of a forward.

The halves have the same latents and timesteps and differ only in their text, which a UNet without other inputs first
sees in a cross-attention. A UNet that also takes pooled text shares nothing, because that is part of the timestep's
embedding. Outputs and gradients are the same up to rounding. models/guided_unet.py puts the halves side by side.
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
    """Hooks on a UNet's modules before the text; they do nothing outside of `shared`."""

    def __init__(self, unet: nn.Module):
        """Puts the hooks on a UNet2DConditionModel of diffusers."""
        self._unet = unet
        self._on = False
        for module in before_text(unet):
            module.register_forward_pre_hook(self._halve, with_kwargs=True)
            module.register_forward_hook(self._double)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Opens a context in which the second half of each forward's rows repeats the first, except for the text.

        It has no effect with gradient checkpointing, whose recomputation happens outside of the context.
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
    """Lists a UNet's modules before the text, in order, without norms and projections.

    The list ends at the first block of a type that SD-1.5 has not, since it may see the text elsewhere.
    """
    if type(unet) is not UNet2DConditionModel or unet.config.addition_embed_type is not None:
        return []
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        if type(block) is not DownBlock2D:
            return [*modules, *before_text_of(block)]
        modules.append(block)
    return modules


def before_text_of(block: nn.Module) -> list[nn.Module]:
    """Lists the modules before the text of a down block that may see the text."""
    if type(block) is not CrossAttnDownBlock2D or type(block.attentions[0]) is not Transformer2DModel:
        return []
    first = block.attentions[0].transformer_blocks[0]
    if type(first) is not BasicTransformerBlock or first.only_cross_attention:
        return []
    return [block.resnets[0], first.attn1]


def first_half(rows: Tensor) -> Tensor:
    """Returns the first half of the rows: (2N, ...) -> (N, ...)."""
    return rows[: len(rows) // 2]


def twice(rows: Tensor) -> Tensor:
    """Repeats the rows: (N, ...) -> (2N, ...)."""
    return torch.cat([rows, rows])
