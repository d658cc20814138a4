"""DDPO (arXiv 2305.13301): policy gradient on whole trajectories, by the reward of their final images.

A trajectory's advantage is its reward relative to those of its prompt, or of the iteration while its prompt has few.
All steps of a trajectory are in one optimizer step, with PPO's clipped objective.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor

from ..config.methods.ddpo import DDPOConfig
from ..data.embeddings import TrainingPrompts
from ..models.conditioning import Conditioning
from ..models.policy import LoraAnd
from ..rows import Rows, rows
from ..runtime.columns import GRAD_NORM, PROMPTS, UNSCORED, Column, Curve, Sign
from ..runtime.ranks import gather_rows
from ..runtime.session import Session
from ..runtime.signs import ends_above
from .models import Models
from .protocol import Measured
from .rewards import REWARD, Rewarded
from .trajectories import walk

HISTORY = "rewards.json"  # in a checkpoint
COLUMNS = (
    PROMPTS,
    REWARD,
    UNSCORED,
    Column(
        "loss",
        not_drawn="The loss is left out on purpose: it stays near 0 whether a run works or not. Watch the reward.",
    ),
    Column(
        "clipped",
        heading="clipped",
        form="{:.0%}",
        drawn=Curve("Probability ratios beyond the clip", "healthy: stays below 90%", percent=True, from_zero=True),
        signs=(
            Sign(
                ends_above(0.9),
                "{:.0%} of the probability ratios lie beyond optim.clip at the end: try a smaller optim.lr.",
            ),
        ),
    ),
    Column("approx_kl"),
    GRAD_NORM,
)


@dataclass(frozen=True, slots=True)
class Steps(Rows):
    """Steps of trajectories from x_t to x_prev (N, C, H, W); step, prompt (N,) int64: in the schedule, the iteration.

    log_prob (N,): of the step under the policy that sampled it; advantage (N,).
    """

    x_t: Tensor = rows()
    x_prev: Tensor = rows()
    step: Tensor = rows()
    prompt: Tensor = rows()
    log_prob: Tensor = rows()
    advantage: Tensor = rows()
    cond: Conditioning | None = rows(None, default=None)  # of the prompts


@dataclass(frozen=True, slots=True)
class Collected:
    """The trajectories of B prompts: states (T + 1, B, C, H, W), log_prob (T, B), advantage (B,)."""

    states: Tensor
    log_prob: Tensor
    advantage: Tensor
    cond: Conditioning


class DDPO(Rewarded):
    """DDPO samples a trajectory of each prompt and makes the steps of the better ones more likely."""

    columns = COLUMNS
    single_reward = True

    def __init__(self, config: DDPOConfig, models: Models, prompts: TrainingPrompts, session: Session):
        """Raises UserError for a reward that does not load."""
        super().__init__(config, models, prompts, session)
        self.history = History(config.optim.history, config.optim.min_history)
        self.trainable = LoraAnd(models.trainable, self.history)

    def collect(self, iteration: int) -> tuple[Collected, Measured]:
        """Returns a trajectory of each of this rank's prompts with its advantage, and their facts by column.

        Raises UserError if the reward has more than one score, or no finite one on any rank.
        """
        cond, rng = self.prompts.mine(iteration), self.rngs["rollout"]
        x = self.schedule.prior((len(cond), *self.policy.latent_shape), rng)
        which = torch.arange(len(cond), device=x.device)
        states, log_prob = [x], []
        with self.policy.sampling(cond, self.config.rollout.text_kv) as known, self.clock("rollout/trunk"):
            steps = walk(self.policy, self.schedule, x, known, rng)
            for step in self.counted(steps, self.schedule.num_steps, "rollout"):
                states.append(step.x_prev)
                log_prob.append(self.log_prob(step.x_prev, step.x_t, step.eps, torch.full_like(which, step.number)))
        rewards, scored = self.rewards(states[-1], iteration, cond)  # (1, B), (B,)
        everyone = gather_rows(rewards[0], self.ranks).tolist()  # one wait an iteration
        advantage = self.history.advantages(self.prompts.of_all(iteration), everyone)
        advantage = torch.tensor(advantage, device=x.device)[self.ranks.rank * len(cond) :][: len(cond)]
        facts = {"prompts": len(cond), "reward": rewards[0][scored].mean(), UNSCORED.name: (~scored).sum()}
        return Collected(torch.stack(states), torch.stack(log_prob), advantage.float(), cond), facts

    def batches(self, rows: Collected) -> Iterator[Steps]:
        """Yields the micro-batches: all steps of a part of the trajectories, shuffled, for each of optim.updates."""
        optim, device = self.config.optim, rows.advantage.device
        order = torch.randperm(len(rows.advantage), generator=self.rngs["shuffle"], device=device)
        parts = order.chunk(optim.updates)
        batches = (batch for part in parts for batch in self.steps_of(rows, part).split(optim.micro_batch))
        return self.counted(batches, len(parts) * self.config.accumulate, "update")

    def steps_of(self, rows: Collected, trajectories: Tensor) -> Steps:
        """Returns all steps of some trajectories (P,), one trajectory after the other."""
        total = self.schedule.num_steps
        step = torch.arange(total, device=trajectories.device).repeat(len(trajectories))  # (P * T,)
        prompt = trajectories.repeat_interleave(total)
        x_t, x_prev = rows.states[step, prompt], rows.states[step + 1, prompt]
        return Steps(x_t, x_prev, step, prompt, rows.log_prob[step, prompt], rows.advantage[prompt], rows.cond)

    def loss(self, batch: Steps) -> tuple[Tensor, Measured]:
        """Returns PPO's loss of a micro-batch, with gradients in the policy, and its stats."""
        t = self.schedule.timesteps(batch.step, len(batch))
        eps = self.policy.eps(batch.x_t, t, batch.cond[batch.prompt], self.schedule.guided)
        log_ratio = self.log_prob(batch.x_prev, batch.x_t, eps, batch.step) - batch.log_prob
        return ppo_loss(log_ratio, batch.advantage, self.config.optim.clip, self.config.optim.advantage_clip)

    def log_prob(self, x_prev: Tensor, x_t: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        """Returns the log-densities (N,) of steps from x_t to x_prev (N, C, H, W) under eps (G, N, C, H, W)."""
        return self.schedule.log_prob(x_prev.unsqueeze(0), x_t.unsqueeze(0), eps.unsqueeze(1), step)[0]


def ppo_loss(
    log_ratio: Tensor, advantage: Tensor, clip: float, advantage_clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the mean of max(-A r, -A clamp(r, 1 - clip, 1 + clip)), where A is the clamped advantage.

    log_ratio (N,): log r, of the policy to the one that sampled; advantage (N,). Stats, without gradient: `clipped`,
    the share of ratios beyond the clip, some of which have a gradient, and `approx_kl`, half the mean of log r squared.
    Source: PPO (arXiv 1707.06347), equation 7, as in DDPO's code.
    """
    ratio, advantage = log_ratio.exp(), advantage.clamp(-advantage_clip, advantage_clip)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    stats = {
        "loss": loss.detach(),
        "clipped": ((ratio.detach() - 1).abs() > clip).float().mean(),
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
    }
    return loss, stats


class History:
    """The last rewards of each prompt, and the advantages that follow from them.

    longest: how many rewards of a prompt are remembered, None for no memory. least: below so many, the rewards of the
    whole iteration take their place.
    """

    def __init__(self, longest: int | None, least: int):
        self.longest, self.least = longest, least
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Sequence[float]) -> list[float]:
        """Remembers the rewards of an iteration and returns (r - mean) / (standard deviation + 1e-6) of each.

        Those that are not finite count for nothing, and their advantage is 0. Source: PerPromptStatTracker of DDPO's
        code; without memory its denominator has 1e-8.
        """
        finite = [reward for reward in rewards if math.isfinite(reward)]
        if self.longest:
            for prompt, reward in zip(prompts, rewards, strict=True):
                if math.isfinite(reward):
                    self.rewards.setdefault(prompt, deque(maxlen=self.longest)).append(reward)
        everyone = fmean(finite), pstdev(finite)
        relative = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            own = self.rewards.get(prompt, ())
            mean, deviation = (fmean(own), pstdev(own)) if own and len(own) >= self.least else everyone
            advantage = (reward - mean) / (deviation + (1e-6 if self.longest else 1e-8))
            relative.append(advantage if math.isfinite(reward) else 0.0)
        return relative

    def save(self, folder: Path) -> None:
        """Writes folder/HISTORY."""
        rewards = {prompt: list(values) for prompt, values in self.rewards.items()}
        (folder / HISTORY).write_text(json.dumps(rewards), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        rewards = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
        self.rewards = {prompt: deque(values, maxlen=self.longest) for prompt, values in rewards.items()}
