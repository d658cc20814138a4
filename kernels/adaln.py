"""LayerNorm modulated by a time embedding (adaLN), and the residual that stands before it.

    adaln_modulate:        y = LayerNorm(x) * (1 + scale) + shift
    gated_residual_adaln:  h = residual + gate * branch;  y = LayerNorm(h) * (1 + scale) + shift

Shapes: x, residual, branch, h, y (B, L, D); weight, bias (D,); shift, scale, gate (B, D).
The functions `<op>_ref` are plain PyTorch and define the meaning of each op; they are what runs here. There is no
nn.Module: whoever calls the functions owns the parameters.
"""

import torch.nn.functional as F
from torch import Tensor


def adaln_modulate_ref(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return y * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual_adaln_ref(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    h = residual + gate.unsqueeze(1) * branch
    return h, adaln_modulate_ref(h, weight, bias, shift, scale, eps)


def adaln_modulate(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift (DiT, arXiv 2212.09748, section 3.2).

    x (B, L, D); weight, bias (D,) of the LayerNorm; shift, scale (B, D). Returns (B, L, D).
    With shift = scale = 0 the result equals F.layer_norm bit for bit.
    Raises ValueError naming the argument whose shape does not fit.
    """
    _check_rows(x, "x", weight=weight, bias=bias, shift=shift, scale=scale)
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
    """The step between two sub-layers of a modulated block: gated residual, then modulated LayerNorm.

    residual, branch (B, L, D); gate, shift, scale (B, D); weight, bias (D,). Returns (h, y), both (B, L, D), with
    h = residual + gate * branch and y = LayerNorm(h) * (1 + scale) + shift.
    Raises ValueError naming the argument whose shape does not fit.
    """
    _check_rows(residual, "residual", weight=weight, bias=bias, gate=gate, shift=shift, scale=scale)
    if branch.shape != residual.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}, expected that of residual, {tuple(residual.shape)}")
    return gated_residual_adaln_ref(residual, branch, gate, weight, bias, shift, scale, eps)


def _check_rows(x: Tensor, name: str, weight: Tensor, bias: Tensor, **modulation: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, L, D)")
    rows, _, width = x.shape
    expected = {"weight": (weight, (width,)), "bias": (bias, (width,))}
    expected |= {key: (value, (rows, width)) for key, value in modulation.items()}
    for key, (value, shape) in expected.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}, expected {shape} for {name} of {tuple(x.shape)}")
        if value.device != x.device:
            raise ValueError(f"{key} is on {value.device}, expected {x.device} like {name}")
