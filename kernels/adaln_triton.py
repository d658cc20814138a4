"""Triton kernel of the forward and torch ops of adaln.py, which has the formulas, the shapes and the `_ref` functions.

Rows x (B, L, D) with mean m and reciprocal deviation r of their own:

    n = (x - m) r;  y = n (weight (1 + scale)) + (bias (1 + scale) + shift)

The gated op first forms h = residual + gate branch, rounds it to its type and goes on with x = h.

Bytes per element of (B, L, D), with s the size of the type: adaln_modulate reads s and writes s, gated_residual_adaln
reads 2s and writes 2s. On top come the vectors, which every program loads anew for its ROWS rows, from L2 as a rule.
A row is held in registers, in pieces of COLUMNS numbers, and read once. Rows of D <= 1536 have one warp each, whose sum
waits for no other. All arithmetic is float32, in a fixed order: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .adaln import adaln_backward_ref, adaln_forward_ref
from .adaln_backward_triton import adaln_backward
from .backend import launch, on_triton, rows_of


@triton.jit
def _vector(ptr, cols, inside):
    """Loads columns for every row of a tile, in whose layout they then are, without a way through shared memory."""
    return tl.load(tl.broadcast_to(ptr + cols, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pieces(ptr, held, row, within, width):
    """Stores rows that are held in pieces; after all loads, because no load moves up past a store."""
    COLUMNS: tl.constexpr = held[0].shape[1]
    for piece in tl.static_range(len(held)):
        cols = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(ptr + row * width + cols, held[piece], mask=within & (cols < width))


@triton.jit
def _mean(total, width):
    return tl.div_rn(tl.sum(total, axis=1, keep_dims=True), tl.cast(width, tl.float32))


@triton.jit
def _adaln_fwd_kernel(
    x_ptr,  # (B, L, D): x, or residual if GATED
    branch_ptr,  # (B, L, D) if GATED, else unused
    gate_ptr,  # (B, D) if GATED, else unused
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    shift_ptr,  # (B, D)
    scale_ptr,  # (B, D)
    h_ptr,  # (B, L, D), written if GATED
    y_ptr,  # (B, L, D), written
    stats_ptr,  # (2, B, L) float32, written: mean and reciprocal deviation
    gate_stride,  # elements between rows
    shift_stride,
    scale_stride,
    stats_stride,  # B L
    length,  # L
    width,  # D
    eps,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,  # rows of one b to a program
    COLUMNS: tl.constexpr,  # of a piece, power of two
    PIECES: tl.constexpr,  # cdiv(D, COLUMNS), held in registers
):
    tiles = tl.cdiv(length, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    within = rows < length
    row = b * length + rows
    held, total = (), tl.zeros([ROWS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        cols = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = within & (cols < width)
        h = tl.load(x_ptr + row * width + cols, mask=inside, other=0.0)
        if GATED:
            branch = tl.load(branch_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
            gate = _vector(gate_ptr + b * gate_stride, cols, inside)
            h = (h.to(tl.float32) + gate * branch).to(h_ptr.dtype.element_ty)
        held = held + (h,)
        total += h.to(tl.float32)
    if GATED:
        _store_pieces(h_ptr, held, row, within, width)
    mean = _mean(total, width)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        cols = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        centred = tl.where(cols < width, held[piece].to(tl.float32) - mean, 0.0)
        total += centred * centred
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(total, width) + tl.cast(eps, tl.float32)))
    tl.store(stats_ptr + row, mean, mask=within)
    tl.store(stats_ptr + stats_stride + row, rstd, mask=within)
    written = ()
    for piece in tl.static_range(PIECES):
        cols = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = within & (cols < width)
        weight, bias = _vector(weight_ptr, cols, inside), _vector(bias_ptr, cols, inside)
        shift = _vector(shift_ptr + b * shift_stride, cols, inside)
        scale = 1.0 + _vector(scale_ptr + b * scale_stride, cols, inside)
        y = (held[piece].to(tl.float32) - mean) * rstd * (weight * scale) + (bias * scale + shift)
        written = written + (y.to(y_ptr.dtype.element_ty),)
    _store_pieces(y_ptr, written, row, within, width)


def pieces(width: int) -> dict[str, int]:
    """Returns the tile of a program: rows in at most 6 pieces, of 8 numbers to a thread where D >= 256."""
    columns = min(triton.next_power_of_2(width), 256 * triton.next_power_of_2(triton.cdiv(width, 1536)))
    rows, warps = max(1, min(16, 1024 // columns)), max(4, columns // 256)
    return {"ROWS": rows, "COLUMNS": columns, "PIECES": triton.cdiv(width, columns), "num_warps": warps}


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Returns (h or None if not gated, y, stats)."""
    gated = gate is not None
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    shift, scale = rows_of(shift), rows_of(scale)
    branch, gate = (branch.contiguous(), rows_of(gate)) if gated else (x, shift)
    batch, length, width = x.shape
    y, h = torch.empty_like(x), torch.empty_like(x) if gated else None
    stats = x.new_empty((2, batch, length), dtype=torch.float32)
    tile = pieces(int(width))
    launch(_adaln_fwd_kernel)[(batch * triton.cdiv(length, tile["ROWS"]),)](
        x, branch, gate, weight, bias, shift, scale, h if gated else y, y, stats,
        gate.stride(0), shift.stride(0), scale.stride(0), batch * length, length, width, eps, GATED=gated, **tile,
    )  # fmt: skip
    return h, y, stats


@triton_op("strop::adaln_modulate", mutates_args=())
def adaln_modulate_op(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (y, stats); stats (2, B, L) are for the backward."""
    forward = _forward if on_triton(x, width=x.shape[-1]) else adaln_forward_ref
    return forward(x, None, None, weight, bias, shift, scale, eps)[1:]


@triton_op("strop::adaln_modulate_backward", mutates_args=())
def adaln_modulate_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dweight, dbias, dshift, dscale."""
    backward = adaln_backward if on_triton(x, width=x.shape[-1]) else adaln_backward_ref
    dx, _, _, *parameter_grads = backward(dy, None, x, None, None, weight, bias, scale, stats)
    return dx, *parameter_grads


@triton_op("strop::gated_residual_adaln", mutates_args=())
def gated_residual_adaln_op(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (h, y, stats); stats (2, B, L) are for the backward."""
    forward = _forward if on_triton(residual, width=residual.shape[-1]) else adaln_forward_ref
    return forward(residual, branch, gate, weight, bias, shift, scale, eps)


@triton_op("strop::gated_residual_adaln_backward", mutates_args=())
def gated_residual_adaln_backward_op(
    dh: Tensor,
    dy: Tensor,
    h: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dresidual, dbranch, dgate, dweight, dbias, dshift, dscale."""
    backward = adaln_backward if on_triton(h, width=h.shape[-1]) else adaln_backward_ref
    return backward(dy, dh, h, branch, gate, weight, bias, scale, stats)


def _save_modulate(ctx, inputs, output) -> None:
    x, weight, bias, _, scale, _ = inputs
    ctx.save_for_backward(x, weight, bias, scale, output[1])


def _backward_modulate(ctx, dy: Tensor, _) -> tuple[Tensor | None, ...]:
    return *torch.ops.strop.adaln_modulate_backward(dy, *ctx.saved_tensors), None


def _save_gated(ctx, inputs, output) -> None:
    _, branch, gate, weight, bias, _, scale, _ = inputs
    h, _, stats = output
    ctx.save_for_backward(h, branch, gate, weight, bias, scale, stats)


def _backward_gated(ctx, dh: Tensor, dy: Tensor, _) -> tuple[Tensor | None, ...]:
    return *torch.ops.strop.gated_residual_adaln_backward(dh, dy, *ctx.saved_tensors), None


adaln_modulate_op.register_autograd(_backward_modulate, setup_context=_save_modulate)
gated_residual_adaln_op.register_autograd(_backward_gated, setup_context=_save_gated)
