"""Triton kernel and torch op of ddim_branch and ddim_x0_hat; ddim.py has formulas, shapes and `_ref` functions.

E = C H W numbers to a row; the model output m = eps_uncond + guidance (eps_text - eps_uncond) is formed on the way.
Per number of x_t, with s the size of the types: reads (3 + K) s, without guidance (2 + K) s, and writes K s + 4.
All arithmetic is float32. The table of coefficients and rows of any number of steps go in as they are, with strides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .backend import launch, on_triton
from .ddim import ddim_branch_ref, per_row

BLOCK = 1024  # numbers of a row to a program


@triton.jit
def guided(uncond, text, guidance, GUIDED: tl.constexpr):
    """Does as guide_ref with loaded numbers."""
    return uncond + guidance * (text - uncond) if GUIDED else text


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
    guidance = tl.cast(guidance, tl.float32)  # torch.compile passes Python's numbers in float64
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offset = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    at = row * size + offset
    numbers = table_ptr + row * table_col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    text = tl.load(text_ptr + at, mask=inside, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32) if GUIDED else text
    m = guided(uncond, text, guidance, GUIDED)
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


@triton_op("strop::ddim_branch", mutates_args=())
def ddim_branch_op(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (branches, x0_hat)."""
    branch = _branch if on_triton(x_t, eps_text) else ddim_branch_ref
    return branch(x_t, eps_uncond, eps_text, guidance, coefficients, noise)


def _save_branch(ctx, inputs, output) -> None:
    x_t, eps_uncond, eps_text, ctx.guidance, coefficients, _ = inputs
    ctx.guided, ctx.dtypes = eps_uncond is not None, (x_t.dtype, eps_text.dtype)
    ctx.save_for_backward(coefficients)


def _backward_branch(ctx, dbranches: Tensor, dx0: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the gradients in PyTorch: the step is linear in its tensors, so they are a few multiplications."""
    x0_from_x, x0_from_m, from_x, from_m, sigma = per_row(ctx.saved_tensors[0], dx0)
    dmean, (latents, outputs) = dbranches.to(dx0.dtype).sum(0), ctx.dtypes
    dm = x0_from_m * dx0 + from_m * dmean
    dx = (x0_from_x * dx0 + from_x * dmean).to(latents)
    dnoise = (sigma * dbranches).to(latents)
    if not ctx.guided:
        return dx, None, dm.to(outputs), None, None, dnoise
    return dx, ((1 - ctx.guidance) * dm).to(outputs), (ctx.guidance * dm).to(outputs), None, None, dnoise


ddim_branch_op.register_autograd(_backward_branch, setup_context=_save_branch)
