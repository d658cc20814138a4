"""GradSPO: SPO's rollout, with a regression onto a target beside the prediction in place of log-probabilities.

The best and the worst branch of a step came from noises z. The winner's target is the average policy's prediction moved
against (z_best - z_worst) / 2, the loser's is that moved the other way; the policy is to come closer to the former than
the reference does, by SPO's loss of log-ratios -|eps - target|^2 + |eps_ref - target|^2. An exponential moving average
of the policy's weights does the sampling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config.methods.gradspo import GradSPOConfig
from ..data.embeddings import TrainingPrompts
from ..models.averaged import Average
from ..models.policy import LoraAnd
from ..runtime.session import Session
from .models import Models
from .protocol import Measured
from .spo.loss import spo_loss
from .spo.method import SPO, Collected
from .spo.pairs import PreferencePairs
from .spo.update import MicroBatch


class GradSPO(SPO):
    """GradSPO collects SPO's pairs by the averaged policy and regresses the policy onto targets beside its average."""

    def __init__(self, config: GradSPOConfig, models: Models, prompts: TrainingPrompts, session: Session):
        super().__init__(config, models, prompts, session)
        self.average = Average(models.policy.parameters, config.optim.ema)
        self.trainable = LoraAnd(models.trainable, self.average)
        self.schedule = self.learner.schedule
        scheduler = models.diffusion.scheduler
        self.predicts_v = scheduler.config.prediction_type == "v_prediction"
        self.alphas = scheduler.alphas_cumprod.float().to(session.ranks.device)

    def collect(self, iteration: int) -> tuple[Collected, Measured]:
        """Returns the rollout of this rank's prompts by the averaged policy, and its facts by column."""
        with self.average.in_place():
            return super().collect(iteration)

    def batches(self, rows: Collected) -> Iterator[MicroBatch]:
        """Yields the micro-batches; after those that complete an optimizer step, the average follows the policy."""
        for batch in super().batches(rows):
            yield batch
            self.average.waiting = (self.average.waiting + 1) % self.config.accumulate
            if self.average.waiting == 0:
                self.average.follow()

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Measured]:
        """Returns the loss of a micro-batch, with gradients in the policy, and its stats, as `spo_loss` does."""
        learner, pairs, optim = self.learner, batch.pairs, self.config.optim
        with self.average.in_place(), torch.no_grad():
            average = learner.predict(batch)
        reference = learner.predict_reference(batch) if pairs.eps_ref is None else pairs.eps_ref
        away = self.away(pairs.x_prev, pairs.step, optim.strength)
        eps, eps_ref, eps_average = (self.noise(m, pairs) for m in (learner.predict(batch), reference, average))
        return spo_loss(target_log_ratio(eps, eps_ref, eps_average, away), optim.beta, optim.clip)

    def noise(self, model_output: Tensor, pairs: PreferencePairs) -> Tensor:
        """Returns the guided prediction of the noise in x_t, (N, C, H, W), for outputs (G, 1, N, C, H, W)."""
        predicted = self.schedule.guide(model_output)[0]
        if not self.predicts_v:
            return predicted
        alpha = self.alphas[self.schedule.timesteps(pairs.step, len(pairs))].view(-1, 1, 1, 1)
        return alpha.sqrt() * predicted + (1 - alpha).sqrt() * pairs.x_t[0]

    def away(self, x_prev: Tensor, step: Tensor, strength: float) -> Tensor:
        """Returns how far the winner's target lies from the average prediction, (N, C, H, W).

        x_prev (2, N, C, H, W), winner first: half of the difference of the noises that made them, and as large a part
        of it as there is noise in x_t.
        """
        alpha = self.alphas[self.schedule.timesteps(step, len(step))]
        scale = -strength * (1 - alpha).sqrt() / (2 * self.schedule.sigma(step))
        return scale.view(-1, 1, 1, 1) * (x_prev[0] - x_prev[1])


def target_log_ratio(eps: Tensor, eps_ref: Tensor, eps_average: Tensor, away: Tensor) -> Tensor:
    """Computes |eps_ref - target|^2 - |eps - target|^2, means over C, H, W, for winner's and loser's target: (2, N).

    All (N, C, H, W): predictions of the noise with a gradient in eps alone; the winner's target is eps_average + away,
    the loser's eps_average - away. It is computed from eps - eps_ref, which are nearly alike.
    """
    targets = torch.stack([eps_average + away, eps_average - away])  # (2, N, C, H, W)
    return ((eps_ref - eps) * (eps_ref + eps - 2 * targets)).flatten(2).mean(-1)
