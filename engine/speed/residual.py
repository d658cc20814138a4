"""Replaces diffusers' residual block by one with the same bits and fewer passes over memory.

diffusers divides the block's output by a scale, which is 1 in Stable Diffusion's UNets and VAEs, and its SiLUs write
new tensors, which only a backward pass needs. A block that does more than those of these models (resampling, another
scale, another use of the timestep) is left unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class LeanResidual(ResnetBlock2D):
    """Replaces a ResnetBlock2D that satisfies `can_be_lean`, with the same parameters and the same bits."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """Maps input_tensor (N, C, H, W) and temb (N, D), None in a VAE, to (N, O, H, W)."""
        h = self.conv1(activated(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            h += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(activated(self.norm2(h)))
        h += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return h


def activated(h: Tensor) -> Tensor:
    """Applies SiLU, in place unless gradients are enabled."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


def make_residuals_lean(model: nn.Module) -> int:
    """Replaces every residual block that satisfies `can_be_lean`, in place; returns how many."""
    blocks = [module for module in model.modules() if can_be_lean(module)]
    for module in blocks:
        module.__class__ = LeanResidual
    return len(blocks)


def can_be_lean(module: nn.Module) -> bool:
    """Whether `module` is a plain ResnetBlock2D, as in Stable Diffusion's UNets and VAEs."""
    if type(module) is not ResnetBlock2D or type(module.nonlinearity) is not nn.SiLU:
        return False
    resamples = module.upsample is not None or module.downsample is not None
    if module.time_emb_proj is None:
        plain_time = module.time_embedding_norm != "scale_shift"
    else:
        plain_time = module.time_embedding_norm == "default" and not module.skip_time_act
    return not resamples and plain_time and module.output_scale_factor == 1 and module.dropout.p == 0
