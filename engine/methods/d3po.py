"""D3PO (arXiv 2311.13231): two trajectories of a prompt are compared by their final images, and every step learns it.

Both begin at the same noise. The better one's steps are winners, the other's losers, of the DPO loss on DDIM
log-probabilities that SPO has too; where neither is better, a step has the loss ln 2 and no gradient. With several
rewards a trajectory is better if it is in one and in none worse. optim.discount switches to the objective of
DenseReward (arXiv 2402.08265).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.methods.d3po import D3POConfig
from ..data.embeddings import TrainingPrompts
from ..models.conditioning import Conditioning
from ..rows import rows
from ..runtime.columns import GRAD_NORM, PROMPTS, UNSCORED, Column, Curve, Sign
from ..runtime.session import Session
from ..runtime.signs import ends_above
from .columns import ACCURACY, CLIPPED, LOSS, MARGIN, PAIRS
from .models import Models
from .protocol import Measured, finite_mean
from .rewards import REWARD, Rewarded
from .spo.loss import spo_loss
from .spo.pairs import PreferencePairs
from .spo.update import Learner, MicroBatch, micro_batches
from .trajectories import walk

COLUMNS = (
    PROMPTS,
    REWARD,
    PAIRS,
    UNSCORED,
    Column(
        "tied",
        heading="tied",
        form="{:.0%}",
        drawn=Curve("Pairs of which neither is better", "healthy: stays below 50%", percent=True, from_zero=True),
        signs=(
            Sign(
                ends_above(0.5),
                "Neither trajectory is better in {:.0%} of the pairs at the end, and such a pair teaches nothing: look "
                "at the reward.",
            ),
        ),
    ),
    LOSS,
    MARGIN,
    ACCURACY,
    CLIPPED,
    GRAD_NORM,
)


@dataclass(frozen=True, slots=True)
class TrajectoryPairs(PreferencePairs):
    """Steps of pairs of trajectories, winner first; tied (N,) bool: whether neither trajectory is the better one."""

    tied: Tensor | None = rows(default=None)


@dataclass(frozen=True, slots=True)
class Collected:
    """The trajectories of B prompts: states (T + 1, 2, B, C, H, W), winner first; tied (B,) bool."""

    states: Tensor
    tied: Tensor
    cond: Conditioning


class D3PO(Rewarded):
    """D3PO samples pairs of trajectories and trains the policy to prefer every step of the better one."""

    columns = COLUMNS

    def __init__(self, config: D3POConfig, models: Models, prompts: TrainingPrompts, session: Session):
        """Raises UserError for a reward that does not load."""
        super().__init__(config, models, prompts, session)
        self.learner = Learner(models.policy, self.schedule, config.optim)
        device, discount = session.ranks.device, config.optim.discount
        self.weights = step_weights(self.schedule.num_steps, discount).to(device) if discount else None
        self.rngs["steps"] = torch.Generator(device).manual_seed(config.run.seed)  # drawn alike on all ranks

    def collect(self, iteration: int) -> tuple[Collected, Measured]:
        """Returns two trajectories of each of this rank's prompts, the better first, and their facts by column.

        Raises UserError if no reward of any rank is finite.
        """
        cond, rng = self.prompts.mine(iteration), self.rngs["rollout"]
        x = self.schedule.prior((len(cond), *self.policy.latent_shape), rng).repeat(2, 1, 1, 1)  # (2B, C, H, W)
        states = [x]
        with self.policy.sampling(cond, self.config.rollout.text_kv) as known, self.clock("rollout/trunk"):
            steps = walk(self.policy, self.schedule, x, known.repeat(2), rng)
            states += [step.x_prev for step in self.counted(steps, self.schedule.num_steps, "rollout")]
        rewards, finite = self.rewards(states[-1], iteration, cond.repeat(2))  # (M, 2B), (2B,)
        scored = finite.unflatten(0, (2, -1)).all(0)  # (B,)
        better = preferred(rewards.unflatten(1, (2, -1))) * scored  # (B,)
        order = torch.stack([better < 0, better >= 0]).long()  # (2, B): the trajectory that comes first, and second
        prompts = torch.arange(len(cond), device=order.device)
        states = torch.stack(states).unflatten(1, (2, -1))[:, order, prompts]  # (T + 1, 2, B, C, H, W)
        facts = {
            "prompts": len(cond),
            "pairs": len(cond),
            "reward": finite_mean(rewards),
            "tied": (better == 0).float().mean(),
            UNSCORED.name: (~scored).sum(),
        }
        return Collected(states, better == 0, cond), facts

    def batches(self, rows: Collected) -> Iterator[MicroBatch]:
        """Yields the micro-batches of this rank's pairs: all steps of optim.pairs of them, or those drawn, a time."""
        optim, device = self.config.optim, rows.tied.device
        order = torch.randperm(len(rows.tied), generator=self.rngs["shuffle"], device=device)
        parts = order.split(optim.pairs)
        batches = (
            batch
            for pairs in parts
            for batch in micro_batches(self.steps_of(rows, pairs), optim.micro_batch, rows.cond)
        )
        return self.counted(batches, len(parts) * self.config.accumulate, "update")

    def steps_of(self, rows: Collected, pairs: Tensor) -> TrajectoryPairs:
        """Returns steps of some pairs of trajectories (P,) for an optimizer step, pair by pair: all, or those drawn."""
        if self.weights is not None:
            draws = self.config.optim.draws
            steps = torch.multinomial(self.weights, draws, replacement=True, generator=self.rngs["steps"])
        else:
            steps = torch.arange(self.schedule.num_steps, device=pairs.device)
        step, pair = steps.repeat(len(pairs)), pairs.repeat_interleave(len(steps))  # (P * S,)
        x_t, x_prev = (rows.states[at, :, pair].transpose(0, 1) for at in (step, step + 1))  # (2, P * S, C, H, W)
        alike = (step == 0) & (self.weights is None)  # one forward serves both; drawn steps keep their order instead
        return TrajectoryPairs(x_t, x_prev, step, pair, alike, tied=rows.tied[pair])

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Measured]:
        """Returns the loss of a micro-batch, with gradients in the policy, and its stats, as `spo_loss` does."""
        pairs, optim = batch.pairs, self.config.optim
        eps, eps_ref = self.learner.predict(batch), self.learner.predict_reference(batch)
        log_ratio = self.schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, eps_ref, pairs.step)  # (2, N)
        if optim.discount:
            return discounted_loss(log_ratio, pairs.tied, optim.beta, optim.clip, optim.draws)
        return d3po_loss(log_ratio, pairs.tied, optim.beta, optim.clip)


def preferred(rewards: Tensor) -> Tensor:
    """Compares two trajectories by M rewards (M, 2, B): +1 where the first dominates, -1 where the second does, else 0.

    One dominates if none of its rewards is lower and one is higher. Source: the authors' train_d3po.py.
    """
    first, second = rewards.unbind(1)
    dominates = lambda one, other: (one >= other).all(0) & (one > other).any(0)
    return dominates(first, second).int() - dominates(second, first).int()


def d3po_loss(log_ratio: Tensor, tied: Tensor, beta: float, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes SPO's loss of log-ratios (2, N), winner first, where tied (N,) pairs have the constant loss ln 2.

    Source: D3PO's equation 13 with the authors' clamp of the ratio.
    """
    return spo_loss(log_ratio.masked_fill(tied, 0.0), beta, clip)


def discounted_loss(
    log_ratio: Tensor, tied: Tensor, beta: float, clip: float, draws: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes -log sigmoid(beta * (mean log r_winner - mean log r_loser)), the means over the steps drawn of a pair.

    log_ratio (2, P * draws) and tied (P * draws,), the steps of a pair one after the other; each log r is clamped to
    [-clip, clip]. Returns the mean over P pairs and the stats of `spo_loss`. Source: DenseReward (arXiv 2402.08265),
    whose ListMLE of two trajectories this is.
    """
    by_pair = log_ratio.clamp(-clip, clip).unflatten(1, (-1, draws)).mean(-1)  # (2, P)
    loss, stats = spo_loss(by_pair.masked_fill(tied[::draws], 0.0), beta, clip=None)
    return loss, stats | {"clipped": (log_ratio.detach().abs() >= clip).float().mean()}


def step_weights(steps: int, discount: float) -> Tensor:
    """Returns the probability of drawing each of `steps` steps, the noisiest first: (steps,) in float32, of sum 1.

    Source: DenseReward's code, p = discount^i / (sum + 1e-8).
    """
    weights = discount ** torch.arange(steps, dtype=torch.float32)
    return weights / (weights.sum() + 1e-8)
