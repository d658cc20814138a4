"""Doubling an image and the 3x3 convolution after it, as one transposed convolution of the small image.

Each pixel of the doubled image is there twice along either axis, so that of three taps along an axis two always fall on
the same small pixel. With those taps added up beforehand an output pixel costs 4 multiplications a channel in place of
9, and the doubled image is never written: a transposed convolution of stride 2 whose 4x4 kernel is the 3x3 kernel
laid over the 2x2 block of a doubled pixel. The sums are made in float32; the numbers are the same but for rounding.
Nothing here knows of models but that diffusers' Upsample2D doubles images so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class FoldedUpsample(nn.Module):
    """In place of an Upsample2D with a frozen 3x3 convolution: (N, C, H, W) -> (N, O, 2H, 2W)."""

    def __init__(self, upsample: Upsample2D):
        """Keeps the parameters of `upsample` under their names; any size but the double is left to it."""
        super().__init__()
        self.conv = upsample.conv
        self.former = (upsample,)  # in a tuple, so that its parameters are not there twice
        self.register_buffer("kernel", folded(self.conv.weight), persistent=False)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self.former[0](hidden_states, output_size)
        return F.conv_transpose2d(hidden_states, self.kernel, self.conv.bias, stride=2, padding=1)


def folded(weight: Tensor) -> Tensor:
    """Weight (O, C, 3, 3) of a convolution -> kernel (C, O, 4, 4) of the transposed one."""
    turned = weight.float().flip(2, 3).transpose(0, 1)
    laid = [F.pad(turned, (right, 1 - right, down, 1 - down)) for right in (0, 1) for down in (0, 1)]
    return torch.stack(laid).sum(0).to(weight.dtype)


def fold_upsamplers(model: nn.Module) -> int:
    """Puts a FoldedUpsample in place of every Upsample2D of a frozen model that can have one; returns how many."""
    found = [(name, module) for name, module in model.named_modules() if foldable(module)]
    for name, module in found:
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_module(own, FoldedUpsample(module))
    return len(found)


def foldable(module: nn.Module) -> bool:
    """Whether it is diffusers' Upsample2D with a plain, frozen 3x3 convolution, as Stable Diffusion's networks have."""
    conv = getattr(module, "conv", None)
    if type(module) is not Upsample2D or type(conv) is not nn.Conv2d or module.norm is not None:
        return False
    if not module.interpolate or conv.weight.requires_grad or conv.padding_mode != "zeros":
        return False
    taps = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups
    return taps == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
