"""Triton kernels and torch ops of ddim.py, where the formulas, the shapes and the references stand.

E = C H W numbers to a row; the model output m = eps_uncond + guidance (eps_text - eps_uncond) is formed on the way.
Per number of x_t, with s the size of the types: ddim_branch reads (3 + K) s and writes K s + 4; ddim_log_prob reads 5 s
where winner and loser share x_t, else 8 s (the log-ratio 7 s or 12 s), and writes 4 / BLOCK; their common backward
reads as much as ddim_log_prob and writes 2 s, or 4 s. Without guidance each model output is one tensor instead of two.

All arithmetic is float32. The mean over a latent is summed in two stages, in a fixed order and without atomics: the
same bits on every run. The constants of the log-density are added after the sum, where they cost no accuracy. The
log-ratio sums d (x_prev - mean_ref - d / 2) with d = mean - mean_ref = mean_from_m (m - m_ref), and is never the
difference of two log-densities. Its gradient in the policy's prediction is that of ddim_log_prob.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from strop.kernels.backend import launch, on_triton
from strop.kernels.ddim import (
    ddim_branch_ref,
    ddim_log_prob_backward_ref,
    ddim_log_prob_ref,
    ddim_log_ratio_ref,
    per_row,
)

BLOCK = 1024  # numbers of a row to a program
PARTS = 64  # of its sums at a time
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _guided(uncond_ptr, text_ptr, at, inside, guidance, GUIDED: tl.constexpr):
    m = tl.load(text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = uncond + guidance * (m - uncond)
    return m


@triton.jit
def _ddim_branch_kernel(
    x_ptr,  # (N, E)
    uncond_ptr,  # (N, E) if GUIDED, else unused
    text_ptr,  # (N, E)
    noise_ptr,  # (K, N, E)
    table_ptr,  # (5, N) float32
    branches_ptr,  # (K, N, E), written
    x0_ptr,  # (N, E) float32, written
    table_row,  # strides of the table
    table_col,
    guidance,
    size,  # E
    total,  # N E
    K: tl.constexpr,
    GUIDED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # branches at a time, a power of two
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    at = row * size + offset
    numbers = table_ptr + row * table_col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = _guided(uncond_ptr, text_ptr, at, inside, guidance, GUIDED)
    x0_hat = tl.load(numbers) * x + tl.load(numbers + table_row) * m
    tl.store(x0_ptr + at, x0_hat, mask=inside)
    mean = tl.load(numbers + 2 * table_row) * x + tl.load(numbers + 3 * table_row) * m
    sigma = tl.load(numbers + 4 * table_row)
    for first in tl.static_range(0, K, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        many = k.to(tl.int64)[:, None] * total + at[None, :]
        drawn = (k < K)[:, None] & inside[None, :]
        noise = tl.load(noise_ptr + many, mask=drawn, other=0.0).to(tl.float32)
        branches = mean[None, :] + sigma * noise
        tl.store(branches_ptr + many, branches.to(branches_ptr.dtype.element_ty), mask=drawn)


@triton.jit
def _ddim_log_prob_fwd_kernel(
    x_prev_ptr,  # (2, N, E)
    x_ptr,  # (R, N, E), and so are all model outputs
    uncond_ptr,  # if GUIDED, else unused
    text_ptr,
    ref_uncond_ptr,  # if RATIO and GUIDED, else unused
    ref_text_ptr,  # if RATIO, else unused
    table_ptr,  # (5, N) float32
    sums_ptr,  # (2, N, blocks) float32, written
    table_row,  # strides of the table
    table_col,
    guidance,
    size,  # E
    rows,  # N
    GUIDED: tl.constexpr,
    RATIO: tl.constexpr,
    SHARED: tl.constexpr,  # R = 1
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    from_x = tl.load(table_ptr + row * table_col + 2 * table_row)
    from_m = tl.load(table_ptr + row * table_col + 3 * table_row)
    for s in tl.static_range(2):
        mine = row + s * rows  # of (2, N)
        at = mine * size + offset
        x_prev = tl.load(x_prev_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHARED:
            at = row * size + offset
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = _guided(uncond_ptr, text_ptr, at, inside, guidance, GUIDED)
        if RATIO:
            m_ref = _guided(ref_uncond_ptr, ref_text_ptr, at, inside, guidance, GUIDED)
            d = from_m * (m - m_ref)
            each = d * (x_prev - from_x * x - from_m * m_ref - 0.5 * d)
        else:
            away = x_prev - from_x * x - from_m * m
            each = away * away
        tl.store(sums_ptr + mine * blocks + block, tl.sum(tl.where(inside, each, 0.0), axis=0))


@triton.jit
def _ddim_log_prob_sum_kernel(
    sums_ptr,  # (2, N, blocks) float32
    table_ptr,  # (5, N) float32
    out_ptr,  # (2, N) float32, written
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
    mean = tl.sum(total, axis=0) / size / (sigma * sigma)
    if RATIO:
        found = mean
    else:
        found = -0.5 * mean - tl.log(sigma) - HALF_LOG_TWO_PI
    tl.store(out_ptr + mine, found)


@triton.jit
def _ddim_log_prob_bwd_kernel(
    grad_ptr,  # (2, N) float32
    x_prev_ptr,  # (2, N, E)
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
    SHARED: tl.constexpr,  # R = 1
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    from_x = tl.load(table_ptr + row * table_col + 2 * table_row)
    from_m = tl.load(table_ptr + row * table_col + 3 * table_row)
    sigma = tl.load(table_ptr + row * table_col + 4 * table_row)
    slope = from_m / (sigma * sigma) / size
    dm = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(2):
        mine = row + s * rows  # of (2, N)
        at = mine * size + offset
        x_prev = tl.load(x_prev_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHARED:
            at = row * size + offset
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = _guided(uncond_ptr, text_ptr, at, inside, guidance, GUIDED)
        own = tl.load(grad_ptr + mine) * slope * (x_prev - from_x * x - from_m * m)
        dm = own if not SHARED else dm + own
        if s == 1 or not SHARED:
            if GUIDED:
                duncond = (1.0 - guidance) * dm
                tl.store(duncond_ptr + at, duncond.to(duncond_ptr.dtype.element_ty), mask=inside)
                tl.store(dtext_ptr + at, (guidance * dm).to(dtext_ptr.dtype.element_ty), mask=inside)
            else:
                tl.store(dtext_ptr + at, dm.to(dtext_ptr.dtype.element_ty), mask=inside)


def _branch(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    x_t, eps_text, noise = x_t.contiguous(), eps_text.contiguous(), noise.contiguous()
    uncond = eps_text if eps_uncond is None else eps_uncond.contiguous()
    branches, x0_hat = torch.empty_like(noise), torch.empty_like(x_t, dtype=torch.float32)
    k, rows = int(noise.shape[0]), x_t.shape[0]
    size = x_t.shape[1] * x_t.shape[2] * x_t.shape[3]
    launch(_ddim_branch_kernel)[(rows * triton.cdiv(size, BLOCK),)](
        x_t, uncond, eps_text, noise, coefficients, branches, x0_hat, *coefficients.stride(), guidance,
        size, rows * size, K=k, GUIDED=eps_uncond is not None, AT_ONCE=max(1, min(8, triton.next_power_of_2(k))),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return branches, x0_hat


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
    """(2, N): the log-ratio if ref_text is given, else the log-density."""
    guided, ratio = eps_uncond is not None, ref_text is not None
    x_prev, x_t, text = x_prev.contiguous(), x_t.contiguous(), eps_text.contiguous()
    uncond = eps_uncond.contiguous() if guided else text
    ref_text = ref_text.contiguous() if ratio else text
    ref_uncond = ref_uncond.contiguous() if guided and ratio else text
    rows = x_prev.shape[1]
    size = x_prev.shape[2] * x_prev.shape[3] * x_prev.shape[4]
    blocks = triton.cdiv(size, BLOCK)
    sums = x_prev.new_empty((2, rows, blocks), dtype=torch.float32)
    launch(_ddim_log_prob_fwd_kernel)[(rows * blocks,)](
        x_prev, x_t, uncond, text, ref_uncond, ref_text, coefficients, sums, *coefficients.stride(), guidance,
        size, rows, GUIDED=guided, RATIO=ratio, SHARED=x_t.shape[0] == 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    found = sums.new_empty((2, rows))
    launch(_ddim_log_prob_sum_kernel)[(2 * rows,)](
        sums, coefficients, found, *coefficients.stride(), size, rows, blocks, RATIO=ratio, PARTS=PARTS, num_warps=1
    )
    return found


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
    launch(_ddim_log_prob_bwd_kernel)[(rows * triton.cdiv(size, BLOCK),)](
        grad, x_prev, x_t, uncond, text, coefficients, duncond, dtext, *coefficients.stride(), guidance,
        size, rows, GUIDED=guided, SHARED=x_t.shape[0] == 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return duncond, dtext


@triton_op("strop::ddim_branch", mutates_args=())
def ddim_branch_op(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(branches, x0_hat)."""
    branch = _branch if on_triton(x_t, eps_text) else ddim_branch_ref
    return branch(x_t, eps_uncond, eps_text, guidance, coefficients, noise)


@triton_op("strop::ddim_log_prob", mutates_args=())
def ddim_log_prob_op(
    x_prev: Tensor, x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> Tensor:
    """Log-densities (2, N)."""
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
    """Log-ratios (2, N)."""
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
    """Gradients in eps_uncond (empty without it) and eps_text, of ddim_log_prob and ddim_log_ratio alike."""
    backward = _log_prob_backward if on_triton(x_t, eps_text) else ddim_log_prob_backward_ref
    return backward(grad, x_prev, x_t, eps_uncond, eps_text, guidance, coefficients)


def _save_branch(ctx, inputs, output) -> None:
    x_t, eps_uncond, eps_text, ctx.guidance, coefficients, _ = inputs
    ctx.guided, ctx.dtypes = eps_uncond is not None, (x_t.dtype, eps_text.dtype)
    ctx.save_for_backward(coefficients)


def _backward_branch(ctx, dbranches: Tensor, dx0: Tensor) -> tuple[Tensor | None, ...]:
    """The step is linear in its tensors: a few multiplications, for which PyTorch will do."""
    x0_from_x, x0_from_m, from_x, from_m, sigma = per_row(ctx.saved_tensors[0], dx0)
    dmean, (latents, outputs) = dbranches.to(dx0.dtype).sum(0), ctx.dtypes
    dm = x0_from_m * dx0 + from_m * dmean
    dx = (x0_from_x * dx0 + from_x * dmean).to(latents)
    dnoise = (sigma * dbranches).to(latents)
    if not ctx.guided:
        return dx, None, dm.to(outputs), None, None, dnoise
    return dx, ((1 - ctx.guidance) * dm).to(outputs), (ctx.guidance * dm).to(outputs), None, None, dnoise


def _save_log_prob(ctx, inputs, output) -> None:
    x_prev, x_t, eps_uncond, eps_text, *_, ctx.guidance, coefficients = inputs
    ctx.constants = len(inputs) - 4  # arguments after eps_text
    ctx.save_for_backward(x_prev, x_t, eps_uncond, eps_text, coefficients)


def _backward_log_prob(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *given, coefficients = ctx.saved_tensors
    duncond, dtext = torch.ops.strop.ddim_log_prob_backward(grad, *given, ctx.guidance, coefficients)
    return None, None, None if given[2] is None else duncond, dtext, *[None] * ctx.constants


ddim_branch_op.register_autograd(_backward_branch, setup_context=_save_branch)
ddim_log_prob_op.register_autograd(_backward_log_prob, setup_context=_save_log_prob)
ddim_log_ratio_op.register_autograd(_backward_log_prob, setup_context=_save_log_prob)
