"""Diffusion-DPO (arXiv 2311.12908): beside the reference, winners' errors fall and losers' rise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.methods.diffusion_dpo import DiffusionDPOConfig
from ..data.embeddings import TrainingPrompts
from ..runtime.session import Session
from .columns import ACCURACY, MARGIN
from .models import Models
from .offline import NoisedPairs, Offline, columns, errors
from .protocol import Measured

SAMPLER_STEPS = 50  # whose steps optim.discount counts


class DiffusionDPO(Offline):
    """Diffusion-DPO trains the policy to denoise winners better than the reference does, and losers worse."""

    columns = columns(MARGIN, ACCURACY)

    def __init__(self, config: DiffusionDPOConfig, models: Models, prompts: TrainingPrompts, session: Session):
        super().__init__(config, models, prompts, session)
        discount, total = config.optim.discount, len(models.diffusion.scheduler.alphas_cumprod)
        self.weights = None if discount is None else discounted(total, discount).to(session.ranks.device)

    def timesteps(self, count: int) -> Tensor:
        """Draws the timesteps of pairs, (count,) int64: all are as likely, or noisy ones more with optim.discount."""
        if self.weights is None:
            return super().timesteps(count)
        return torch.multinomial(self.weights, count, replacement=True, generator=self.rng)

    def loss(self, batch: NoisedPairs) -> tuple[Tensor, Measured]:
        """Returns the loss of a micro-batch, with gradients in the policy, and its stats."""
        with self.policy.reference():
            reference = self.predict(batch)
        prediction = self.predict(batch)
        loss, stats = diffusion_dpo_loss(changes(prediction, reference, batch.target), self.config.optim.beta)
        return loss, stats | {"error": errors(prediction.detach(), batch.target)[0].mean()}


def changes(prediction: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Computes the policy's error minus the reference's, means over C, h, w: three times (2, N, C, h, w) -> (2, N).

    It is computed from the difference of the predictions, which are nearly alike.
    """
    return ((prediction - reference) * (prediction + reference - 2 * target)).flatten(2).mean(-1)


def diffusion_dpo_loss(change: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes -log sigmoid(-beta / 2 (change of the winner's error - change of the loser's)).

    change (2, N): the policy's error minus the reference's, winner first. Returns the mean loss and, without gradient,
    `margin` (the mean of what the sigmoid is of) and `accuracy` (share of pairs in which that is positive; zero counts
    half). Source: equation 14 of Diffusion-DPO with the published implementation's mean over a latent.
    """
    margin = -beta / 2 * (change[0] - change[1])
    loss = -F.logsigmoid(margin).mean()
    free = margin.detach()
    return loss, {"loss": loss.detach(), "margin": free.mean(), "accuracy": 0.5 + 0.5 * free.sign().mean()}


def discounted(total: int, discount: float) -> Tensor:
    """Returns how likely each of `total` timesteps is, (total,), not normalised: discount^i at the sampler's i-th step.

    The sampler has SAMPLER_STEPS steps, of which the first, i = 0, is the noisiest.
    """
    step = torch.arange(total - 1, -1, -1) * SAMPLER_STEPS // total
    return discount ** step.double()
