"""MaPO (arXiv 2406.06424): the policy learns to denoise winners, and better than losers, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.columns import Column, Curve, Trend
from .offline import NoisedPairs, Offline, columns, errors
from .protocol import Measured

TIMESTEPS = 1000  # the weight of the difference of the scores
SCALE = 0.5
SMALL = 1e-4  # below which the score is computed from its series


class MaPO(Offline):
    """MaPO trains the policy on winners, and to prefer them to losers."""

    columns = columns(
        Column(
            "margin",
            heading="margin",
            form="{:+.3f}",
            drawn=Curve("Margin, winner over loser", "healthy: rises", limit=0.0),
            trend=Trend("the margin", "up"),
        ),
        Column(
            "accuracy",
            heading="accuracy",
            form="{:.0%}",
            drawn=Curve("Pairs whose winner is denoised better", "healthy: rises", limit=0.5, percent=True),
        ),
    )

    def loss(self, batch: NoisedPairs) -> tuple[Tensor, Measured]:
        """Returns the loss of a micro-batch, with gradients in the policy, and its stats."""
        return mapo_loss(errors(self.predict(batch), batch.target), self.config.optim.beta)


def mapo_loss(error: Tensor, beta: float, scale: float = SCALE) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the winner's error - beta log sigmoid(TIMESTEPS (g(winner's error) - g(loser's))).

    error (2, N): mean squared errors, winner first; g as `score`. Returns the mean loss and, without gradient, `error`
    (the winners' mean), `margin` (the mean of what the sigmoid is of) and `accuracy` (share of pairs in which that is
    positive; zero counts half). Source: MaPO (arXiv 2406.06424) as published in code.
    """
    margin = TIMESTEPS * (score(error[0], scale) - score(error[1], scale))
    loss = error[0].mean() - beta * F.logsigmoid(margin).mean()
    free = margin.detach()
    stats = {"margin": free.mean(), "accuracy": 0.5 + 0.5 * free.sign().mean()}
    return loss, stats | {"loss": loss.detach(), "error": error[0].detach().mean()}


def score(error: Tensor, scale: float) -> Tensor:
    """Computes g = s l / (exp(s l) - 1) of errors l, in float64, because differences of it are multiplied by 1000.

    The form is exp(-s l) s l / (1 - exp(-s l)), whose gradient is finite for large errors; for small ones, 0 included,
    it is 1 - s l / 2 + (s l)^2 / 12.
    """
    x = scale * error.double()
    small = x < SMALL
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 + x * x / 12, safe * torch.exp(-safe) / -torch.expm1(-safe))
