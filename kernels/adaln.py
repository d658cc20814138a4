"""Computes LayerNorm modulated by a time embedding (adaLN), and the gated residual before it.

    adaln_modulate:        y = LayerNorm(x) * (1 + scale) + shift
    gated_residual_adaln:  h = residual + gate * branch;  y = LayerNorm(h) * (1 + scale) + shift

Shapes: x, residual, branch, h, y (B, L, D); weight, bias (D,); shift, scale, gate (B, D).
The functions `<op>_ref` are plain PyTorch and define the meaning of each op: float32 inside (float64 for float64), one
rounding to the type of the input at the end of each formula. They run everywhere but on CUDA tensors; those go to the
kernels of adaln_triton.py, up to D = 4096. There is no nn.Module: whoever calls the functions owns the parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_alike, on_triton, outside_autocast, wide


def adaln_modulate_ref(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5
) -> Tensor:
    dtype, inside = x.dtype, wide(x)
    x, weight, bias, shift, scale = (each.to(inside) for each in (x, weight, bias, shift, scale))
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return (y * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(dtype)


def gated_residual_ref(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    inside = wide(residual)
    return (residual.to(inside) + gate.to(inside).unsqueeze(1) * branch.to(inside)).to(residual.dtype)


def gated_residual_adaln_ref(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    h = gated_residual_ref(residual, branch, gate)
    return h, adaln_modulate_ref(h, weight, bias, shift, scale, eps)


def adaln_forward_ref(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    h = x if gate is None else gated_residual_ref(x, branch, gate)
    variance, mean = torch.var_mean(h.to(wide(h)), dim=-1, correction=0)
    stats = torch.stack([mean, (variance + eps).rsqrt()])
    return None if gate is None else h, adaln_modulate_ref(h, weight, bias, shift, scale, eps), stats


def adaln_backward_ref(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    dtype, inside = h.dtype, wide(h)
    dy, h, weight, bias, scale = (each.to(inside) for each in (dy, h, weight, bias, scale))
    mean, rstd = stats.unsqueeze(-1)  # (B, L, 1) each
    n, scale = (h - mean) * rstd, 1 + scale
    e = dy * (weight * scale).unsqueeze(1)
    dx = rstd * (e - e.mean(-1, keepdim=True) - n * (e * n).mean(-1, keepdim=True))
    dbranch = dgate = None
    if gate is not None:
        dx = dx + dh.to(inside)
        dbranch, dgate = dx * gate.to(inside).unsqueeze(1), (dx * branch.to(inside)).sum(1)
    sum_dy_n, sum_dy = (dy * n).sum(1), dy.sum(1)  # (B, D) each
    dweight, dbias, dscale = (scale * sum_dy_n).sum(0), (scale * sum_dy).sum(0), weight * sum_dy_n + bias * sum_dy
    gradients = (dx, dbranch, dgate, dweight, dbias, sum_dy, dscale)
    return tuple(grad if grad is None else grad.to(dtype) for grad in gradients)


def adaln_modulate(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Computes LayerNorm(x) * (1 + scale) + shift (DiT, arXiv 2212.09748, section 3.2).

    x (B, L, D); weight, bias (D,) of the LayerNorm; shift, scale (B, D), of any stride between rows; all of one type
    and on one device. Under autocast the arguments are cast to float32, as F.layer_norm does.
    Returns (B, L, D) in the type of x. Differentiable in every tensor, once on CUDA.
    With shift = scale = 0 the reference equals F.layer_norm bit for bit.
    Raises ValueError naming the argument that does not fit, what it was and what it should be.
    """
    _check_rows(x, "x", weight=weight, bias=bias, shift=shift, scale=scale)
    x, weight, bias, shift, scale = outside_autocast(x, weight, bias, shift, scale)
    check_alike(x, "x", weight=weight, bias=bias, shift=shift, scale=scale)
    if on_triton(x, width=x.shape[-1]):
        return torch.ops.strop.adaln_modulate(x, weight, bias, shift, scale, eps)[0]
    return adaln_modulate_ref(x, weight, bias, shift, scale, eps)


def gated_residual_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Computes the step between two sub-layers of a modulated block: gated residual, then modulated LayerNorm.

    residual, branch (B, L, D); gate, shift, scale (B, D); weight, bias (D,); otherwise as for adaln_modulate. Returns
    (h, y), both (B, L, D), with h = residual + gate * branch and y = LayerNorm(h) * (1 + scale) + shift, where h is
    taken as returned, rounded to its type. Raises ValueError naming the argument that does not fit.
    """
    _check_rows(residual, "residual", weight=weight, bias=bias, gate=gate, shift=shift, scale=scale)
    if branch.shape != residual.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of residual, {tuple(residual.shape)}")
    tensors = outside_autocast(residual, branch, gate, weight, bias, shift, scale)
    residual, branch, gate, weight, bias, shift, scale = tensors
    check_alike(residual, "residual", branch=branch, gate=gate, weight=weight, bias=bias, shift=shift, scale=scale)
    if on_triton(residual, width=residual.shape[-1]):
        return torch.ops.strop.gated_residual_adaln(*tensors, eps)[:2]
    return gated_residual_adaln_ref(*tensors, eps)


def _check_rows(x: Tensor, name: str, weight: Tensor, bias: Tensor, **modulation: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, L, D)")
    rows, _, width = x.shape
    expected = {"weight": (weight, (width,)), "bias": (bias, (width,))}
    expected |= {key: (value, (rows, width)) for key, value in modulation.items()}
    for key, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, expected {shape} for {name} of {tuple(x.shape)}")
