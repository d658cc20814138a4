"""Computes the stochastic DDIM step with classifier-free guidance, its k branches, and its log-probability.

    m       = eps_uncond + guidance * (eps_text - eps_uncond)          model output, epsilon or v
    x0_hat  = x0_from_x * x_t + x0_from_m * m
    branch  = mean_from_x * x_t + mean_from_m * m + sigma * noise      ~ p(x_{t-1} | x_t)
    log p   = mean over C, H, W of -(x_prev - mean)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2
    log p / p_ref = mean over C, H, W of d (x_prev - mean_ref - d / 2) / sigma^2,  d = mean_from_m * (m - m_ref)

Both the predicted clean latent and the DDIM mean are linear in (x_t, m), for epsilon and for v prediction alike, so a
step is five numbers: DDIMCoefficients computes them in float64 and stores them in float32.
Shapes: x_t, eps_* (N, C, H, W); noise, branches (K, N, C, H, W); coefficients (5, N); and of a log-probability
x_prev (S, N, C, H, W), x_t, eps_* (R, N, C, H, W): R = 1 where the S latents x_prev of a row come from one x_t, R = S
where each has its own.
The functions `<op>_ref` are plain PyTorch and define the meaning of each op: float32 inside, float64 where an input is.
They run everywhere but on CUDA tensors; those go to the kernels of ddim_triton.py. The log-probabilities, which take
microseconds of a micro-batch and which no kernel computed faster than torch.compile, are plain PyTorch everywhere.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import check_alike, on_triton, wide


@dataclass(frozen=True, slots=True)
class DDIMCoefficients:
    """The table of one schedule: a row for each number, a column for each step (index 0 is the noisiest).

    t: training timesteps, `num_steps` of them and then 0, the timestep of the clean latent. Those of DDIM are whole
    numbers; those of a rectified flow are 1000 sigma, and need not be.
    table: (5, num_steps) float32: x0_from_x, x0_from_m, mean_from_x, mean_from_m, sigma; in units of the latents.
    """

    t: tuple[float, ...]
    table: Tensor

    @classmethod
    def build(
        cls, alphas_cumprod: Tensor, num_steps: int, eta: float, prediction_type: str = "epsilon", steps_offset: int = 1
    ) -> "DDIMCoefficients":
        """Builds the table from alphas_cumprod (1000,) in (0, 1), with "leading" spacing.

        As published, the step after the last one ends at alphas_cumprod[0], not at 1 (formula 12 of DDIM,
        arXiv 2010.02502, with sigma from formula 16). prediction_type: "epsilon" or "v_prediction". Raises ValueError
        for another one, and for num_steps out of range.
        """
        train_steps = len(alphas_cumprod)
        if not 1 <= num_steps <= train_steps:
            raise ValueError(f"num_steps is {num_steps}, expected 1 to {train_steps}")
        ratio = train_steps // num_steps
        t = [ratio * i + steps_offset for i in reversed(range(num_steps))]
        t = torch.tensor(t).clamp(max=train_steps - 1)
        alphas = alphas_cumprod.detach().cpu().double()
        a = alphas[t]
        a_prev = alphas[(t - ratio).clamp(0)]
        sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).clamp(min=0).sqrt()
        toward = (1 - a_prev - sigma**2).clamp(min=0).sqrt()  # weight of eps in the mean
        if prediction_type == "epsilon":
            x0_from_x, x0_from_m = a.rsqrt(), -(1 / a - 1).sqrt()
            eps_from_x, eps_from_m = torch.zeros_like(a), torch.ones_like(a)
        elif prediction_type == "v_prediction":
            x0_from_x, x0_from_m = a.sqrt(), -(1 - a).sqrt()
            eps_from_x, eps_from_m = (1 - a).sqrt(), a.sqrt()
        else:
            raise ValueError(f"prediction_type is {prediction_type!r}, expected 'epsilon' or 'v_prediction'")
        mean_from_x = a_prev.sqrt() * x0_from_x + toward * eps_from_x
        mean_from_m = a_prev.sqrt() * x0_from_m + toward * eps_from_m
        table = torch.stack([x0_from_x, x0_from_m, mean_from_x, mean_from_m, sigma])
        return cls((*t.tolist(), 0), table.float())


def guide_ref(eps_uncond: Tensor | None, eps_text: Tensor, guidance: float) -> Tensor:
    text = eps_text.to(wide(eps_text))
    return text if eps_uncond is None else eps_uncond + guidance * (text - eps_uncond)


def away_from_mean(x_prev: Tensor, x_t: Tensor, model_output: Tensor, from_x: Tensor, from_m: Tensor) -> Tensor:
    """Computes x_prev - mean. from_x is nearly 1: subtracting x_t first keeps the digits that a small sigma needs."""
    x_prev, x_t = x_prev.to(from_x), x_t.to(from_x)
    return x_prev - x_t - (from_x - 1) * x_t - from_m * model_output


def ddim_x0_hat_ref(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> Tensor:
    from_x, from_m = per_row(coefficients[:2], x_t, eps_text)
    return from_x * x_t + from_m * guide_ref(eps_uncond, eps_text, guidance)


def ddim_branch_ref(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    x0_from_x, x0_from_m, from_x, from_m, sigma = per_row(coefficients, x_t, eps_text)
    model_output = guide_ref(eps_uncond, eps_text, guidance)
    branches = from_x * x_t + from_m * model_output + sigma * noise
    return branches.to(x_t.dtype), x0_from_x * x_t + x0_from_m * model_output


def ddim_x0_hat(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> Tensor:
    """Predicts the clean latent of each row (formula 12 of DDIM, its first term).

    Arguments and errors as for ddim_branch. Returns (N, C, H, W), float32 or wider.
    """
    _check_step(x_t, eps_uncond, eps_text, guidance, coefficients, "(N, C, H, W)")
    if on_triton(x_t, eps_text):  # a step with no branches
        no_noise = x_t.new_empty((0, *x_t.shape))
        return torch.ops.strop.ddim_branch(x_t, eps_uncond, eps_text, float(guidance), coefficients, no_noise)[1]
    return ddim_x0_hat_ref(x_t, eps_uncond, eps_text, guidance, coefficients)


def ddim_branch(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws K stochastic DDIM steps from each row, and predicts the row's clean latent.

    x_t, eps_* (N, C, H, W), eps_uncond None without guidance; noise (K, N, C, H, W) standard normal, of the type of
    x_t; coefficients (5, N) float32, the columns of a DDIMCoefficients.table that belong to the rows. eps_* are of one
    type, which need not be that of x_t. Returns branches (K, N, C, H, W) in the type of x_t and x0_hat (N, C, H, W) in
    float32 or wider. Raises ValueError naming the argument that does not fit, what it was and what it should be.
    """
    _check_step(x_t, eps_uncond, eps_text, guidance, coefficients, "(N, C, H, W)")
    if noise.shape[1:] != x_t.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected (K, {', '.join(map(str, x_t.shape))})")
    check_alike(x_t, "x_t", noise=noise)
    if on_triton(x_t, eps_text):
        return torch.ops.strop.ddim_branch(x_t, eps_uncond, eps_text, float(guidance), coefficients, noise)
    return ddim_branch_ref(x_t, eps_uncond, eps_text, guidance, coefficients, noise)


def ddim_log_prob(
    x_prev: Tensor, x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> Tensor:
    """Computes the log-density of drawing x_prev from x_t, as published the mean over C, H, W instead of the sum.

    x_prev (S, N, C, H, W), S >= 1; x_t, eps_* (R, N, C, H, W) with R = 1 where all S share x_t, else R = S;
    coefficients (5, N) float32, the same for all S. S is 1 for a trajectory, 2 for winner and loser. x_prev and x_t are
    of one type, eps_* of one type. Differentiable in eps_* alone. Returns (S, N), float32 or wider. Raises ValueError
    naming the argument that does not fit, or that asks for a gradient it cannot have.
    """
    _check_log_prob(x_prev, x_t, eps_uncond, eps_text, guidance, coefficients)
    _check_constant(x_prev=x_prev, x_t=x_t)
    from_x, from_m, sigma = per_row(coefficients[2:], x_t, eps_text)
    away = away_from_mean(x_prev, x_t, guide_ref(eps_uncond, eps_text, guidance), from_x, from_m)
    log_density = -(away**2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(2).mean(-1)


def ddim_log_ratio(
    x_prev: Tensor,
    x_t: Tensor,
    eps_uncond: Tensor | None,
    eps_text: Tensor,
    ref_uncond: Tensor | None,
    ref_text: Tensor,
    guidance: float,
    coefficients: Tensor,
) -> Tensor:
    """Computes log p(x_prev | x_t) of the policy's eps_* minus that of the reference's ref_*, in one pass.

    Arguments as for ddim_log_prob, ref_* like eps_*. Computed from the difference of the predictions, and therefore
    exact to rounding where the two agree, while ddim_log_prob twice loses the digits that both have in common.
    Differentiable in eps_* alone. Returns (S, N), float32 or wider. Raises ValueError naming what does not fit.
    """
    _check_log_prob(x_prev, x_t, eps_uncond, eps_text, guidance, coefficients)
    _check_constant(x_prev=x_prev, x_t=x_t, ref_uncond=ref_uncond, ref_text=ref_text)
    if (ref_uncond is None) != (eps_uncond is None):
        raise ValueError("ref_uncond and eps_uncond: expected both or neither to be None")
    for name, eps in (("ref_uncond", ref_uncond), ("ref_text", ref_text)):
        if eps is not None and eps.shape != x_t.shape:
            raise ValueError(f"{name} has shape {tuple(eps.shape)}, expected that of x_t, {tuple(x_t.shape)}")
    check_alike(eps_text, "eps_text", ref_uncond=ref_uncond, ref_text=ref_text)
    from_x, from_m, sigma = per_row(coefficients[2:], x_t, eps_text)
    away = away_from_mean(x_prev, x_t, guide_ref(ref_uncond, ref_text, guidance), from_x, from_m)
    off_uncond = None if eps_uncond is None else eps_uncond.to(from_m) - ref_uncond.to(from_m)
    d = from_m * guide_ref(off_uncond, eps_text.to(from_m) - ref_text.to(from_m), guidance)  # mean - mean_ref
    ratio = d * (away - d / 2) / sigma**2
    return ratio.flatten(2).mean(-1)


def per_row(numbers: Tensor, *tensors: Tensor) -> Tensor:
    """Shapes (..., N) to (..., N, 1, 1, 1), to broadcast over rows (N, C, H, W), in the type `wide` of the tensors."""
    return numbers[..., None, None, None].to(wide(*tensors))


def _check_log_prob(
    x_prev: Tensor, x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor
) -> None:
    if x_prev.ndim != 5 or x_prev.shape[0] < 1:
        raise ValueError(f"x_prev has shape {tuple(x_prev.shape)}, expected (S, N, C, H, W) with S >= 1")
    many, *row = x_prev.shape
    if x_t.ndim != 5 or x_t.shape[0] not in (1, many) or x_t.shape[1:] != x_prev.shape[1:]:
        leading = "1" if many == 1 else f"1 or {many}"
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected ({leading}, {', '.join(map(str, row))})")
    _check_step(x_t, eps_uncond, eps_text, guidance, coefficients, "(R, N, C, H, W)")
    check_alike(x_t, "x_t", x_prev=x_prev)


def _check_step(
    x_t: Tensor, eps_uncond: Tensor | None, eps_text: Tensor, guidance: float, coefficients: Tensor, shape: str
) -> None:
    if x_t.ndim != shape.count(",") + 1:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, expected {shape}")
    for name, eps in (("eps_uncond", eps_uncond), ("eps_text", eps_text)):
        if eps is not None and eps.shape != x_t.shape:
            raise ValueError(f"{name} has shape {tuple(eps.shape)}, expected that of x_t, {tuple(x_t.shape)}")
    if tuple(coefficients.shape) != (5, x_t.shape[-4]):
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}, expected (5, {x_t.shape[-4]})")
    if isinstance(guidance, Tensor):
        raise ValueError(f"guidance is a tensor of shape {tuple(guidance.shape)}, expected a number")
    check_alike(eps_text, "eps_text", eps_uncond=eps_uncond)
    for name, tensor in (("eps_text", eps_text), ("coefficients", coefficients)):
        if tensor.device != x_t.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x_t.device} like x_t")
    if coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients is {coefficients.dtype}, expected torch.float32")


def _check_constant(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but only eps_uncond and eps_text get one; detach it")
