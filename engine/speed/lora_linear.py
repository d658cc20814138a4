"""Computes the LoRA of a linear layer, y = W x + b + B A x, with few passes over its rows.

It replaces PEFT's layer, which casts the rows to the LoRA's float32, multiplies them by A and B, scales, adds and casts
back: about ten passes over memory, and a second copy of the rows for the backward pass. Here the small A and B are cast
to the type of the rows, as under autocast, and B's product is added to W's in place. In float32 the numbers are the
same up to rounding. LoRAs with a scale, dropout or a bias are left to PEFT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

# B starts at 0 and grows by about the learning rate per step, where float16 has one or two digits; so it is scaled up
# before the cast. A power of two adds no rounding.
B_SCALE = 64.0


class LeanLora(Linear):
    """Replaces a PEFT Linear that satisfies `can_be_lean`, with the same parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., C) to (..., O) in the type of the base layer."""
        base = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return base(x)
        (name,) = self.active_adapters
        return LowRank.apply(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)


class LowRank(torch.autograd.Function):
    """Maps x (..., C) to (..., O) with frozen weight (O, C), bias (O,) or None, and trained a (R, C), b (O, R)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (N, C)
        low = rows @ a.to(x.dtype).t()  # (N, R)
        y = F.linear(rows, weight, bias).addmm_(low, scaled(b, x.dtype).t(), alpha=1 / B_SCALE)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (N, O)
        grad_low = grad @ scaled(b, grad.dtype)  # (N, R), B_SCALE times that of `low`
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a.to(grad.dtype), alpha=1 / B_SCALE).view(ctx.shape)
        grad_a = (grad_low.t() @ rows).to(a.dtype) / B_SCALE
        return grad_x, None, None, grad_a, (grad.t() @ low).to(b.dtype)


def scaled(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies b by B_SCALE, then casts it."""
    return (B_SCALE * b).to(dtype)


def make_loras_lean(model: nn.Module) -> int:
    """Replaces every LoRA of a linear layer that satisfies `can_be_lean`, in place; returns how many."""
    layers = [module for module in model.modules() if can_be_lean(module)]
    for module in layers:
        module.__class__ = LeanLora
    return len(layers)


def can_be_lean(module: nn.Module) -> bool:
    """Whether `module` is PEFT's layer with one LoRA of scale 1, without dropout, bias or variant such as DoRA."""
    if type(module) is not Linear or type(module.get_base_layer()) is not nn.Linear or len(module.lora_A) != 1:
        return False
    (name,) = module.lora_A
    plain = module.lora_B[name].bias is None and name not in module.lora_variant
    return plain and module.scaling[name] == 1 and type(module.lora_dropout[name]) is nn.Identity
