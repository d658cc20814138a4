"""Triton kernels and torch ops of adaln.py, which has the formulas, the shapes and the `_ref` functions.

Forward, rows x (B, L, D) with mean m and reciprocal deviation r of their own:

    n = (x - m) r;  y = n (weight (1 + scale)) + (bias (1 + scale) + shift)

Backward of dy, with P = sum over L of dy n and S = sum over L of dy, both (B, D), from which all parameters follow:

    e = dy weight (1 + scale);  dx = r (e - mean(e) - n mean(e n))
    dshift = S;  dscale = weight P + bias S;  dweight = sum over B of (1 + scale) P;  dbias = the same of S

The gated op first forms h = residual + gate branch, rounds it to its type and goes on with x = h; its backward adds the
gradient of h to dx: dresidual = dh + dx, dbranch = gate dresidual, dgate = sum over L of dresidual branch.

Bytes per element of (B, L, D), with s the size of the type: adaln_modulate reads s and writes s, backward reads 2s and
writes s; gated_residual_adaln reads 2s and writes 2s, backward reads 4s and writes 2s. On top come the vectors, which
every program loads anew for its ROWS or CHUNK rows, from L2 as a rule, and backward the sums in float32: 8 / CHUNK
(gated 12 / CHUNK) bytes per element, written and read again.
All arithmetic is float32. Sums run over fixed chunks in a fixed order, without atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .adaln import adaln_backward_ref, adaln_forward_ref
from .backend import launch, on_triton, rows_of

SUM_CHUNKS, SUM_COLUMNS = 16, 128  # tile of the second stage of the sums


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
    held = ()
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
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
    mean = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), tl.cast(width, tl.float32))

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        cols = piece * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        centred = tl.where(cols < width, held[piece].to(tl.float32) - mean, 0.0)
        total += centred * centred
    variance = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), tl.cast(width, tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
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


@triton.jit
def _adaln_bwd_kernel(
    dy_ptr,  # (B, L, D)
    dh_ptr,  # (B, L, D) if GATED, else unused: the gradient of h from elsewhere
    h_ptr,  # (B, L, D): h, or x if not GATED
    branch_ptr,  # (B, L, D) if GATED, else unused
    gate_ptr,  # (B, D) if GATED, else unused
    weight_ptr,  # (D,)
    scale_ptr,  # (B, D)
    stats_ptr,  # (2, B, L) float32
    dx_ptr,  # (B, L, D), written: dx, or dresidual if GATED
    dbranch_ptr,  # (B, L, D), written if GATED
    sums_ptr,  # (2 or 3, B, chunks, D) float32, written: P, S and dgate of each chunk
    gate_stride,  # elements between rows
    scale_stride,
    stats_stride,  # B L
    sums_stride,  # B chunks D
    length,  # L
    width,  # D
    chunks,  # cdiv(L, CHUNK)
    GATED: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of one b to a program
    ROWS: tl.constexpr,  # of them at a time
    BLOCK: tl.constexpr,  # power of two >= D
):
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    cols = tl.arange(0, BLOCK)
    within = cols < width
    scale = 1.0 + tl.load(scale_ptr + b * scale_stride + cols, mask=within, other=0.0).to(tl.float32)
    slope = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32) * scale
    gate = tl.load(gate_ptr + b * gate_stride + cols, mask=within, other=0.0).to(tl.float32) if GATED else scale
    none = tl.zeros([BLOCK], tl.float32)
    sum_dy_n, sum_dy, sum_dgate = none, none, none
    for done in tl.range(0, CHUNK, ROWS, num_stages=2):  # the next rows are fetched meanwhile
        rows = first + done + tl.arange(0, ROWS)
        row = b * length + rows
        inside = (rows < length)[:, None] & within[None, :]
        at = row[:, None] * width + cols[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row, mask=rows < length, other=0.0)
        rstd = tl.load(stats_ptr + stats_stride + row, mask=rows < length, other=0.0)
        n = tl.where(inside, (h - mean[:, None]) * rstd[:, None], 0.0)
        sum_dy += tl.sum(dy, axis=0)
        sum_dy_n += tl.sum(dy * n, axis=0)
        e = dy * slope[None, :]
        mean_e, mean_e_n = tl.sum(e, axis=1) / width, tl.sum(e * n, axis=1) / width
        dx = (e - mean_e[:, None] - n * mean_e_n[:, None]) * rstd[:, None]
        if GATED:
            dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_dgate += tl.sum(tl.where(inside, dx * branch, 0.0), axis=0)
            tl.store(dbranch_ptr + at, (dx * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    mine = tl.program_id(0).to(tl.int64) * width + cols
    tl.store(sums_ptr + mine, sum_dy_n, mask=within)
    tl.store(sums_ptr + sums_stride + mine, sum_dy, mask=within)
    if GATED:
        tl.store(sums_ptr + 2 * sums_stride + mine, sum_dgate, mask=within)


@triton.jit
def _adaln_sum_kernel(
    sums_ptr,  # (2 or 3, B, chunks, D) float32
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    scale_ptr,  # (B, D)
    dshift_ptr,  # (B, D), written
    dscale_ptr,  # (B, D), written
    dgate_ptr,  # (B, D), written if GATED
    scaled_ptr,  # (2, B, D) float32, written: (1 + scale) P and (1 + scale) S
    scale_stride,  # elements between rows
    sums_stride,  # B chunks D
    scaled_stride,  # B D
    chunks,
    width,  # D
    GATED: tl.constexpr,
    CHUNKS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,  # columns to a program
):
    blocks = tl.cdiv(width, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    within = cols < width
    sum_dy_n = tl.zeros([BLOCK], tl.float32)
    sum_dy = tl.zeros([BLOCK], tl.float32)
    sum_dgate = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = (b * chunks + chunk)[:, None] * width + cols[None, :]
        inside = (chunk < chunks)[:, None] & within[None, :]
        sum_dy_n += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0), axis=0)
        sum_dy += tl.sum(tl.load(sums_ptr + sums_stride + at, mask=inside, other=0.0), axis=0)
        if GATED:
            sum_dgate += tl.sum(tl.load(sums_ptr + 2 * sums_stride + at, mask=inside, other=0.0), axis=0)
    weight = tl.load(weight_ptr + cols, mask=within, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=within, other=0.0).to(tl.float32)
    scale = 1.0 + tl.load(scale_ptr + b * scale_stride + cols, mask=within, other=0.0).to(tl.float32)
    at = b * width + cols
    tl.store(dshift_ptr + at, sum_dy.to(dshift_ptr.dtype.element_ty), mask=within)
    dscale = weight * sum_dy_n + bias * sum_dy
    tl.store(dscale_ptr + at, dscale.to(dscale_ptr.dtype.element_ty), mask=within)
    if GATED:
        tl.store(dgate_ptr + at, sum_dgate.to(dgate_ptr.dtype.element_ty), mask=within)
    tl.store(scaled_ptr + at, scale * sum_dy_n, mask=within)
    tl.store(scaled_ptr + scaled_stride + at, scale * sum_dy, mask=within)


def tiling(width: int, elements: int, most: int) -> dict[str, int]:
    """Returns ROWS, BLOCK and num_warps of a program that holds about `elements` elements and at most `most` rows."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(most, elements // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // 256))}


def pieces(width: int) -> dict[str, int]:
    """Returns the tile of a forward program: rows in at most 6 pieces, of 8 numbers to a thread where D >= 256.

    A row of D <= 1536 has one warp to itself, which sums it without waiting for others; so none idles at D = 1280.
    """
    columns = min(triton.next_power_of_2(width), 256 * triton.next_power_of_2(triton.cdiv(width, 1536)))
    rows, warps = max(1, min(16, 1024 // columns)), max(4, columns // 256)
    return {"ROWS": rows, "COLUMNS": columns, "PIECES": triton.cdiv(width, columns), "num_warps": warps}


def chunk_of(batch: int, length: int) -> int:
    """Returns how many rows of one b a program sums: enough programs for a large card, few sums; by shapes alone."""
    for chunk in (8, 16, 32):
        if batch * triton.cdiv(length, chunk) <= 1024:
            return chunk
    return 64


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


def _backward(
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
    """Returns dx (dresidual if gated), dbranch, dgate, dweight, dbias, dshift, dscale."""
    gated = gate is not None
    dy, h, weight, bias, scale = dy.contiguous(), h.contiguous(), weight.contiguous(), bias.contiguous(), rows_of(scale)
    dh, branch, gate = (dh.contiguous(), branch.contiguous(), rows_of(gate)) if gated else (dy, h, scale)
    batch, length, width = h.shape
    chunk = chunk_of(batch, length)
    chunks = triton.cdiv(length, chunk)
    dx, dbranch = torch.empty_like(h), torch.empty_like(h) if gated else None
    sums = h.new_empty((3 if gated else 2, batch, chunks, width), dtype=torch.float32)
    launch(_adaln_bwd_kernel)[(batch * chunks,)](
        dy, dh, h, branch, gate, weight, scale, stats, dx, dbranch if gated else dx, sums,
        gate.stride(0), scale.stride(0), batch * length, batch * chunks * width, length, width, chunks,
        GATED=gated, CHUNK=chunk, **tiling(int(width), 2048, chunk),
    )  # fmt: skip
    dshift, dscale = h.new_empty((batch, width)), h.new_empty((batch, width))
    dgate = h.new_empty((batch, width)) if gated else None
    scaled = sums.new_empty((2, batch, width))
    launch(_adaln_sum_kernel)[(batch * triton.cdiv(width, SUM_COLUMNS),)](
        sums, weight, bias, scale, dshift, dscale, dgate if gated else dshift, scaled,
        scale.stride(0), batch * chunks * width, batch * width, chunks, width,
        GATED=gated, CHUNKS=SUM_CHUNKS, BLOCK=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
    dweight, dbias = (part.sum(0).to(weight.dtype) for part in scaled)
    return dx, dbranch, dgate, dweight, dbias, dshift, dscale


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
    backward = _backward if on_triton(x, width=x.shape[-1]) else adaln_backward_ref
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
    backward = _backward if on_triton(h, width=h.shape[-1]) else adaln_backward_ref
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
