"""A schedule maps step indices to timesteps and computes what happens at a step.

It holds a table of coefficients and the guidance scale and passes them to strop.kernels; it draws noise, but never
calls a model. ddim.py builds the table of DDIM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_log_ratio, ddim_x0_hat
from .draws import Replay, normal


class Schedule:
    """A sampler of Gaussian steps, each given by five numbers (strop.kernels: DDIMCoefficients).

    `step` is an index 0..num_steps-1, an int or an (N,) int64 tensor; `t[step]` is its training timestep, an int
    or a float, with t[num_steps] = 0 for the clean latent. `eps` is the model output (G, N, C, H, W): G = 2 are
    the halves without and with the prompt, combined by `guidance`; G = 1 is used directly. Arithmetic is in float32 or
    wider.
    """

    def __init__(self, coefficients: DDIMCoefficients, guidance: float, device: torch.device | str = "cpu"):
        self.num_steps = coefficients.table.shape[1]
        self.t = coefficients.t
        self.guidance = guidance
        self.device = torch.device(device)
        self._table = coefficients.table.to(device)
        self._t = torch.tensor(coefficients.t, device=device)

    @property
    def guided(self) -> bool:
        """Whether predictions need both guidance halves; a scale of 1 needs only the half with the prompt."""
        return self.guidance != 1

    def timesteps(self, step: int | Tensor, rows: int) -> Tensor:
        """Returns the training timesteps of `rows` rows at a step: (rows,) int64."""
        return self._t[step].expand(rows)

    def steps_within(self, low: int, high: int) -> range:
        """Returns the consecutive step indices whose training timesteps lie in [low, high]."""
        inside = [step for step, t in enumerate(self.t[:-1]) if low <= t <= high]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def prior(self, shape: tuple[int, ...], rng: torch.Generator | Replay) -> Tensor:
        """Draws standard normal latents of this shape, the start of every trajectory."""
        return normal(shape, rng, self.device, torch.float32)

    def x0_hat(self, x: Tensor, eps: Tensor, step: int | Tensor) -> Tensor:
        """Predicts clean latents. x (N, C, H, W), eps (G, N, C, H, W) -> (N, C, H, W)."""
        return ddim_x0_hat(x, *self._halves(eps), self.guidance, self._coefficients(step, len(x)))

    def branch(self, x: Tensor, eps: Tensor, step: int | Tensor, k: int, rng: torch.Generator | Replay) -> Tensor:
        """Draws k samples of p(x_{t-1} | x_t) for each row. x (N, C, H, W), eps (G, N, C, H, W) -> (k, N, C, H, W)."""
        noise = normal((k, *x.shape), rng, x.device, x.dtype)
        branches, _ = ddim_branch(x, *self._halves(eps), self.guidance, self._coefficients(step, len(x)), noise)
        return branches

    def mean(self, x: Tensor, eps: Tensor, step: int | Tensor) -> Tensor:
        """Computes the mean of p(x_{t-1} | x_t). x (N, C, H, W), eps (G, N, C, H, W) -> (N, C, H, W)."""
        no_noise = x.new_zeros((1, *x.shape))
        return ddim_branch(x, *self._halves(eps), self.guidance, self._coefficients(step, len(x)), no_noise)[0][0]

    def log_prob(self, x_prev: Tensor, x_t: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        """Computes log-densities (S, N): x_prev (S, N, C, H, W), x_t (R, N, ...), eps (G, R, N, ...)."""
        return ddim_log_prob(x_prev, x_t, *self._halves(eps), self.guidance, self._coefficients(step, x_t.shape[1]))

    def log_ratio(self, x_prev: Tensor, x_t: Tensor, eps: Tensor, eps_ref: Tensor, step: Tensor) -> Tensor:
        """Computes log_prob under eps minus log_prob under eps_ref (S, N), more exactly than by subtraction.

        Differentiable in eps alone; shapes as for log_prob, eps_ref like eps.
        """
        coefficients = self._coefficients(step, x_t.shape[1])
        return ddim_log_ratio(x_prev, x_t, *self._halves(eps), *self._halves(eps_ref), self.guidance, coefficients)

    def guide(self, eps: Tensor) -> Tensor:
        """Combines the guidance halves of eps (G, ...) into one prediction (...), in float32 or wider."""
        text = eps[-1].to(torch.promote_types(eps.dtype, torch.float32))
        return text if len(eps) == 1 else eps[0] + self.guidance * (text - eps[0])

    def sigma(self, step: Tensor) -> Tensor:
        """Returns the standard deviations of p(x_{t-1} | x_t) at steps (N,): (N,) float32."""
        return self._table[4, step]

    def _halves(self, eps: Tensor) -> tuple[Tensor | None, Tensor]:
        return (None, eps[0]) if len(eps) == 1 else (eps[0], eps[1])

    def _coefficients(self, step: int | Tensor, rows: int) -> Tensor:
        columns = self._table[:, step]  # (5,) or (5, N)
        return columns.unsqueeze(-1).expand(-1, rows) if columns.ndim == 1 else columns
