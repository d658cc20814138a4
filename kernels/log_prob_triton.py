"""Triton kernels and torch ops of ddim_log_prob and ddim_log_ratio; ddim.py has formulas, shapes and `_ref`s.

E = C H W numbers to a row. Per number of (N, E), with s the size of the types: ddim_log_prob reads (S + 3 R) s bytes,
ddim_log_ratio (S + 5 R) s, and both write 4 S / BLOCK; their common backward reads as much as ddim_log_prob and writes
2 R s. Without guidance each model output is one tensor instead of two.

A program reads its block of a row of x_t and of the model outputs once and goes through the x_prev that belong to it:
all S where R = 1, one where R = S. The backward adds up their gradients in the order of S.

All arithmetic is float32. The mean over a latent is summed in two stages, in a fixed order and without atomics: the
same bits on every run. The constants of the log-density are added after the sum, where they cost no accuracy. The
log-ratio sums d (x_prev - mean_ref - d / 2) with d = mean_from_m (m - m_ref) and m - m_ref from the differences of the
halves: never a difference of sums that have most digits in common. Its gradient in the policy's prediction is that of
ddim_log_prob.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .backend import launch, on_triton
from .ddim import ddim_log_prob_backward_ref, ddim_log_prob_ref, ddim_log_ratio_ref
from .ddim_triton import BLOCK, guided

PARTS = 64  # sums of a row at a time in the second stage
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _away(x_prev, x, m, from_x, from_m):
    return x_prev - x - (from_x - 1.0) * x - from_m * m  # of the mean; see away_ref


@triton.jit
def _ddim_log_prob_fwd_kernel(
    x_prev_ptr,  # (S, N, E)
    x_ptr,  # (R, N, E), and so are all model outputs
    uncond_ptr,  # if GUIDED, else unused
    text_ptr,
    ref_uncond_ptr,  # if RATIO and GUIDED, else unused
    ref_text_ptr,  # if RATIO, else unused
    table_ptr,  # (5, N) float32
    sums_ptr,  # (S, N, blocks) float32, written
    table_row,  # strides of the table
    table_col,
    guidance,
    size,  # E
    rows,  # N
    GUIDED: tl.constexpr,
    RATIO: tl.constexpr,
    DRAWS: tl.constexpr,  # rows of x_prev to a row of x_t: S where R = 1, else 1
    BLOCK: tl.constexpr,
):
    guidance = tl.cast(guidance, tl.float32)  # torch.compile passes Python's numbers in float64
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of (R, N)
    block = tl.program_id(0) % blocks
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    at = row * size + offset
    numbers = table_ptr + (row % rows) * table_col
    from_x = tl.load(numbers + 2 * table_row)
    from_m = tl.load(numbers + 3 * table_row)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    text = tl.load(text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32) if GUIDED else text
    if RATIO:
        ref_text = tl.load(ref_text_ptr + at, mask=inside, other=0.0).to(tl.float32)
        ref_uncond = tl.load(ref_uncond_ptr + at, mask=inside, other=0.0).to(tl.float32) if GUIDED else ref_text
        d = from_m * guided(uncond - ref_uncond, text - ref_text, guidance, GUIDED)
        m = guided(ref_uncond, ref_text, guidance, GUIDED)
    else:
        m = guided(uncond, text, guidance, GUIDED)
    for s in tl.static_range(DRAWS):
        mine = row + s * rows  # of (S, N)
        x_prev = tl.load(x_prev_ptr + mine * size + offset, mask=inside, other=0.0).to(tl.float32)
        away = _away(x_prev, x, m, from_x, from_m)
        each = d * (away - 0.5 * d) if RATIO else away * away
        tl.store(sums_ptr + mine * blocks + block, tl.sum(tl.where(inside, each, 0.0), axis=0))


@triton.jit
def _ddim_log_prob_sum_kernel(
    sums_ptr,  # (S, N, blocks) float32
    table_ptr,  # (5, N) float32
    out_ptr,  # (S, N) float32, written
    table_row,  # strides of the table
    table_col,
    size,  # E
    rows,  # N
    blocks,
    RATIO: tl.constexpr,
    PARTS: tl.constexpr,
):
    mine = tl.program_id(0).to(tl.int64)
    total = tl.zeros([PARTS], tl.float32)
    for first in range(0, blocks, PARTS):
        part = first + tl.arange(0, PARTS)
        total += tl.load(sums_ptr + mine * blocks + part, mask=part < blocks, other=0.0)
    sigma = tl.load(table_ptr + (mine % rows) * table_col + 4 * table_row)
    mean = tl.div_rn(tl.div_rn(tl.sum(total, axis=0), tl.cast(size, tl.float32)), sigma * sigma)
    if RATIO:
        log_value = mean
    else:
        log_value = -0.5 * mean - tl.log(sigma) - HALF_LOG_TWO_PI
    tl.store(out_ptr + mine, log_value)


@triton.jit
def _ddim_log_prob_bwd_kernel(
    grad_ptr,  # (S, N) float32
    x_prev_ptr,  # (S, N, E)
    x_ptr,  # (R, N, E), and so are the model outputs and their gradients
    uncond_ptr,  # if GUIDED, else unused
    text_ptr,
    table_ptr,  # (5, N) float32
    duncond_ptr,  # written if GUIDED
    dtext_ptr,  # written
    table_row,  # strides of the table
    table_col,
    guidance,
    size,  # E
    rows,  # N
    GUIDED: tl.constexpr,
    DRAWS: tl.constexpr,  # rows of x_prev to a row of x_t: S where R = 1, else 1
    BLOCK: tl.constexpr,
):
    guidance = tl.cast(guidance, tl.float32)  # torch.compile passes Python's numbers in float64
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of (R, N)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    at = row * size + offset
    numbers = table_ptr + (row % rows) * table_col
    from_x = tl.load(numbers + 2 * table_row)
    from_m = tl.load(numbers + 3 * table_row)
    sigma = tl.load(numbers + 4 * table_row)
    slope = tl.div_rn(tl.div_rn(from_m, sigma * sigma), tl.cast(size, tl.float32))
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    text = tl.load(text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32) if GUIDED else text
    m = guided(uncond, text, guidance, GUIDED)
    dm = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(DRAWS):
        mine = row + s * rows  # of (S, N)
        x_prev = tl.load(x_prev_ptr + mine * size + offset, mask=inside, other=0.0).to(tl.float32)
        dm += tl.load(grad_ptr + mine) * slope * _away(x_prev, x, m, from_x, from_m)
    if GUIDED:
        tl.store(duncond_ptr + at, ((1.0 - guidance) * dm).to(duncond_ptr.dtype.element_ty), mask=inside)
        tl.store(dtext_ptr + at, (guidance * dm).to(dtext_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dtext_ptr + at, dm.to(dtext_ptr.dtype.element_ty), mask=inside)


def _draws(x_prev: Tensor, x_t: Tensor) -> int:
    """Returns the rows of x_prev to a row of x_t. Where each has its own x_t, (S, N) is treated as S N rows."""
    return int(x_prev.shape[0]) if x_t.shape[0] == 1 else 1


def _log_prob(
    x_prev: Tensor,
    x_t: Tensor,
    eps_uncond: Tensor | None,
    eps_text: Tensor,
    ref_uncond: Tensor | None,
    ref_text: Tensor | None,
    guidance: float,
    coefficients: Tensor,
) -> Tensor:
    """Returns the log-ratio (S, N) if ref_text is not None, else the log-density (S, N)."""
    guided, ratio = eps_uncond is not None, ref_text is not None
    x_prev, x_t, text = x_prev.contiguous(), x_t.contiguous(), eps_text.contiguous()
    uncond = eps_uncond.contiguous() if guided else text
    ref_text = ref_text.contiguous() if ratio else text
    ref_uncond = ref_uncond.contiguous() if guided and ratio else text
    many, rows = x_prev.shape[:2]
    size = x_prev.shape[2] * x_prev.shape[3] * x_prev.shape[4]
    blocks = triton.cdiv(size, BLOCK)
    sums = x_prev.new_empty((many, rows, blocks), dtype=torch.float32)
    launch(_ddim_log_prob_fwd_kernel)[(x_t.shape[0] * rows * blocks,)](
        x_prev, x_t, uncond, text, ref_uncond, ref_text, coefficients, sums, *coefficients.stride(), guidance,
        size, rows, GUIDED=guided, RATIO=ratio, DRAWS=_draws(x_prev, x_t), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    out = sums.new_empty((many, rows))
    launch(_ddim_log_prob_sum_kernel)[(many * rows,)](
        sums, coefficients, out, *coefficients.stride(), size, rows, blocks, RATIO=ratio, PARTS=PARTS, num_warps=1
    )
    return out


def _log_prob_backward(
    grad: Tensor,
    x_prev: Tensor,
    x_t: Tensor,
    eps_uncond: Tensor | None,
    eps_text: Tensor,
    guidance: float,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    guided = eps_uncond is not None
    grad, x_prev, x_t, text = grad.contiguous(), x_prev.contiguous(), x_t.contiguous(), eps_text.contiguous()
    uncond = eps_uncond.contiguous() if guided else text
    dtext = torch.empty_like(text)
    duncond = torch.empty_like(text) if guided else text.new_empty(0)
    rows = x_prev.shape[1]
    size = x_prev.shape[2] * x_prev.shape[3] * x_prev.shape[4]
    launch(_ddim_log_prob_bwd_kernel)[(x_t.shape[0] * rows * triton.cdiv(size, BLOCK),)](
        grad, x_prev, x_t, uncond, text, coefficients, duncond, dtext, *coefficients.stride(), guidance,
        size, rows, GUIDED=guided, DRAWS=_draws(x_prev, x_t), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return duncond, dtext


@triton_op("strop::ddim_log_prob", mutates_args=())
def ddim_log_prob_op(
    x_prev: Tensor, x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> Tensor:
    """Returns log-densities (S, N)."""
    if on_triton(x_t, eps_text):
        return _log_prob(x_prev, x_t, eps_uncond, eps_text, None, None, guidance, coefficients)
    return ddim_log_prob_ref(x_prev, x_t, eps_uncond, eps_text, guidance, coefficients)


@triton_op("strop::ddim_log_ratio", mutates_args=())
def ddim_log_ratio_op(
    x_prev: Tensor,
    x_t: Tensor,
    eps_uncond: Tensor | None,
    eps_text: Tensor,
    ref_uncond: Tensor | None,
    ref_text: Tensor,
    guidance: float,
    coefficients: Tensor,
) -> Tensor:
    """Returns log-ratios (S, N)."""
    log_ratio = _log_prob if on_triton(x_t, eps_text) else ddim_log_ratio_ref
    return log_ratio(x_prev, x_t, eps_uncond, eps_text, ref_uncond, ref_text, guidance, coefficients)


@triton_op("strop::ddim_log_prob_backward", mutates_args=())
def ddim_log_prob_backward_op(
    grad: Tensor,
    x_prev: Tensor,
    x_t: Tensor,
    eps_uncond: Tensor | None,
    eps_text: Tensor,
    guidance: float,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients in eps_uncond (empty without it) and eps_text, of ddim_log_prob and ddim_log_ratio."""
    backward = _log_prob_backward if on_triton(x_t, eps_text) else ddim_log_prob_backward_ref
    return backward(grad, x_prev, x_t, eps_uncond, eps_text, guidance, coefficients)


def _save_log_prob(ctx, inputs, output) -> None:
    x_prev, x_t, eps_uncond, eps_text, *_, ctx.guidance, coefficients = inputs
    ctx.constants = len(inputs) - 4  # arguments after eps_text
    ctx.save_for_backward(x_prev, x_t, eps_uncond, eps_text, coefficients)


def _backward_log_prob(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, coefficients = ctx.saved_tensors
    duncond, dtext = torch.ops.strop.ddim_log_prob_backward(grad, *tensors, ctx.guidance, coefficients)
    return None, None, None if tensors[2] is None else duncond, dtext, *[None] * ctx.constants


ddim_log_prob_op.register_autograd(_backward_log_prob, setup_context=_save_log_prob)
ddim_log_ratio_op.register_autograd(_backward_log_prob, setup_context=_save_log_prob)
