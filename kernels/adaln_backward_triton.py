"""Triton kernels of the backward of adaln.py; adaln_triton.py has the forward and the torch ops.

With n = (x - m) r of the forward, P = sum over L of dy n and S = sum over L of dy, both (B, D), from which all
parameters follow:

    e = dy weight (1 + scale);  dx = r (e - mean(e) - n mean(e n))
    dshift = S;  dscale = weight P + bias S;  dweight = sum over B of (1 + scale) P;  dbias = the same of S

The gated op, whose x is h = residual + gate branch, adds the gradient of h to dx:

    dresidual = dh + dx;  dbranch = gate dresidual;  dgate = sum over L of dresidual branch

Bytes per element of (B, L, D), with s the size of the type: adaln_modulate reads 2s and writes s, gated_residual_adaln
reads 4s and writes 2s. On top come the vectors, which every program loads for its CHUNK rows, and the sums in float32:
8 / CHUNK (gated 12 / CHUNK) bytes per element, written and read again.
All arithmetic is float32. Sums run over fixed chunks in a fixed order, without atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import launch, rows_of

SUM_CHUNKS, SUM_COLUMNS = 16, 128  # tile of the second stage of the sums


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
    for done in tl.range(0, tl.minimum(CHUNK, length - first), ROWS, num_stages=2):  # fetches the next rows meanwhile
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


def chunk_of(batch: int, length: int) -> int:
    """Returns how many rows of one b a program sums: enough programs for a large card, few sums; by shapes alone."""
    for chunk in (8, 16, 32):
        if batch * triton.cdiv(length, chunk) <= 1024:
            return chunk
    return 64


def adaln_backward(
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
