"""The LoRA of a linear layer in as few passes over its rows as there can be: y = W x + b + B A x.

PEFT's layer, which it stands in for, casts the rows to the LoRA's float32, multiplies them by A and B there, scales,
adds and casts back: some ten passes over memory, and the rows kept a second time for the backward pass. Here A and B,
which are small, are cast to the type of the rows, as under autocast, and what B gives is added up where W's product
lies. In float32 the numbers are the same but for rounding. LoRAs with a scale, dropout or a bias stay PEFT's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

# B begins at 0 and grows by the learning rate a step, where float16 has a digit or two. A power of two changes none.
B_SCALE = 64.0


class LeanLora(Linear):
    """PEFT's Linear for which `can_be_lean` holds: the same parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., O) in the type of the base layer."""
        base = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return base(x)
        (name,) = self.active_adapters
        return LowRank.apply(x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)


class LowRank(torch.autograd.Function):
    """x (..., C), frozen weight (O, C) and bias (O,) or None, a (R, C), b (O, R) -> (..., O)."""

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
    """B_SCALE times b, in another type."""
    return (B_SCALE * b).to(dtype)


def make_loras_lean(model: nn.Module) -> int:
    """Makes every LoRA of a linear layer that can be lean so, in place; returns how many."""
    found = [module for module in model.modules() if can_be_lean(module)]
    for module in found:
        module.__class__ = LeanLora
    return len(found)


def can_be_lean(module: nn.Module) -> bool:
    """Whether it is PEFT's layer with one LoRA of scale 1, without dropout, bias or variant such as DoRA."""
    if type(module) is not Linear or type(module.get_base_layer()) is not nn.Linear or len(module.lora_A) != 1:
        return False
    (name,) = module.lora_A
    plain = module.lora_B[name].bias is None and name not in module.lora_variant
    return plain and module.scaling[name] == 1 and type(module.lora_dropout[name]) is nn.Identity
