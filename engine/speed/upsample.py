"""Folds nearest-neighbour doubling and the 3x3 convolution after it into one transposed convolution.

The doubled image repeats each pixel along both axes, so two of three taps along an axis always fall on the same small
pixel. With those taps added beforehand an output pixel costs 4 multiplications per channel instead of 9, and the
doubled image is never written: the transposed convolution has stride 2 and a 4x4 kernel, the sum of the 3x3 kernel at
the four positions of a 2x2 block. The sums are computed in float32; the numbers are the same up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class FoldedUpsample(nn.Module):
    """Replaces an Upsample2D with a frozen 3x3 convolution: (N, C, H, W) -> (N, O, 2H, 2W)."""

    def __init__(self, upsample: Upsample2D):
        """Keeps the parameters of `upsample` under their names, and calls it for any other size than the double."""
        super().__init__()
        self.conv = upsample.conv
        self.original = (upsample,)  # in a tuple, so that its parameters are not registered twice
        self.register_buffer("kernel", folded(self.conv.weight), persistent=False)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return self.original[0](hidden_states, output_size)
        return F.conv_transpose2d(hidden_states, self.kernel, self.conv.bias, stride=2, padding=1)


def folded(weight: Tensor) -> Tensor:
    """Converts a convolution's weight (O, C, 3, 3) to the kernel (C, O, 4, 4) of the transposed convolution."""
    flipped = weight.float().flip(2, 3).transpose(0, 1)
    shifted = [F.pad(flipped, (right, 1 - right, down, 1 - down)) for right in (0, 1) for down in (0, 1)]
    return torch.stack(shifted).sum(0).to(weight.dtype)


def fold_upsamplers(model: nn.Module) -> int:
    """Replaces every Upsample2D of a model that satisfies `foldable` by a FoldedUpsample; returns how many."""
    upsamplers = [(name, module) for name, module in model.named_modules() if foldable(module)]
    for name, module in upsamplers:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, FoldedUpsample(module))
    return len(upsamplers)


def foldable(module: nn.Module) -> bool:
    """Whether `module` is diffusers' Upsample2D with a plain, frozen 3x3 convolution."""
    conv = getattr(module, "conv", None)
    if type(module) is not Upsample2D or type(conv) is not nn.Conv2d or module.norm is not None:
        return False
    if not module.interpolate or conv.weight.requires_grad or conv.padding_mode != "zeros":
        return False
    taps = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups
    return taps == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
