"""diffusers' residual block without what changes no bit of it: a division by one, and new tensors where old ones do.

The block adds its input to what it made of it and divides the sum by a scale, which is 1 in Stable Diffusion's UNets
and VAEs: a pass over memory for nothing. Its SiLUs write new tensors, which only a backward pass needs. A block that
does more than those of these models (resampling, another scale, another use of the timestep) stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class LeanResidual(ResnetBlock2D):
    """A ResnetBlock2D for which `can_be_lean` holds: the same parameters, the same bits."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """input_tensor (N, C, H, W), temb (N, D) or, in a VAE, None -> (N, O, H, W)."""
        h = self.conv1(activated(self.norm1(input_tensor)))
        if self.time_emb_proj is not None:
            h += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(activated(self.norm2(h)))
        h += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return h


def activated(h: Tensor) -> Tensor:
    """SiLU, in place where no gradient asks for `h`."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


def make_residuals_lean(model: nn.Module) -> int:
    """Makes every residual block of a model that can be lean so, in place; returns how many."""
    found = [module for module in model.modules() if can_be_lean(module)]
    for module in found:
        module.__class__ = LeanResidual
    return len(found)


def can_be_lean(module: nn.Module) -> bool:
    """Whether it is a plain ResnetBlock2D, as in Stable Diffusion's UNets and VAEs."""
    if type(module) is not ResnetBlock2D or type(module.nonlinearity) is not nn.SiLU:
        return False
    resamples = module.upsample is not None or module.downsample is not None
    if module.time_emb_proj is None:
        plain_time = module.time_embedding_norm != "scale_shift"
    else:
        plain_time = module.time_embedding_norm == "default" and not module.skip_time_act
    return not resamples and plain_time and module.output_scale_factor == 1 and module.dropout.p == 0
