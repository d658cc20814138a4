"""Rewards of finished images, by the judge or by any scorer, and what the methods share that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config.online import JUDGE, RewardedConfig
from ..data.embeddings import TrainingPrompts
from ..errors import UserError
from ..models.conditioning import Conditioning
from ..runtime.checkpoint import last_checkpoint
from ..runtime.columns import Column, Curve, Trend
from ..runtime.ranks import Ranks, gather_rows
from ..runtime.session import Session
from ..scorers.find import load_scorer
from ..scorers.scorer import levels
from .models import Models
from .protocol import Method

REWARD = Column(
    "reward",
    heading="reward",
    form="{:.4g}",
    drawn=Curve("Reward", "healthy: rises, then levels off"),
    trend=Trend("the reward", "up"),
)


class Reward:
    """Scores images as a PNG would store them, in 8 bits."""

    def __init__(self, spec: str, models: Models, run_dir: Path, single: bool = False):
        """spec: "judge", or a scorer as evaluate.scorers names them; single: whether it must give one score alone.

        Raises UserError for a scorer that does not load.
        """
        self.spec, self.judge, self.run_dir, self.single = spec, models.judge, run_dir, single
        self.scorer = None if spec == JUDGE else load_scorer(spec, "reward", models.diffusion.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], cond: Conditioning) -> Tensor:
        """Returns M rewards of each image, (M, N) in float32: one, or as many as the scorer gives.

        images (N, 3, H, W) in about [-1, 1], of N prompts. Raises UserError where a scorer gives something else.
        """
        images = levels(images.float()) / 127.5 - 1
        if self.scorer is None:
            return self.judge.score_images(images.unsqueeze(0), cond.judge, t=0)
        scores = self.scorer(images, list(prompts))
        for name, values in scores.items() if isinstance(scores, dict) else ():
            if not isinstance(values, Tensor) or values.shape != (len(images),):
                found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise UserError(
                    f"reward: {self.spec} returns {name} of {found}, expected a tensor of shape ({len(images)},), one "
                    "score an image"
                )
        if not isinstance(scores, dict) or not scores:
            raise UserError(f"reward: {self.spec} returns {scores!r:.60}, expected a dict of a tensor of scores")
        if self.single and len(scores) > 1:
            raise UserError(
                f"reward: {self.spec} returns the scores {', '.join(scores)}, expected one alone; take another scorer, "
                "or a method that compares by several (d3po)"
            )
        return torch.stack([values.to(images.device).float() for values in scores.values()])

    def check(self, rewards: Tensor, iteration: int, ranks: Ranks) -> Tensor:
        """Returns which of the images have finite rewards, (N,) bool, for rewards (M, N).

        Raises UserError, on every rank, if no image of any rank has. A collective call.
        """
        finite = rewards.isfinite().all(0)
        if not gather_rows(finite, ranks).any():
            raise UserError(
                f"iteration {iteration + 1}: reward: {self.spec} gives nothing but NaN or infinity; try a smaller "
                f"optim.lr, a model.dtype of more range, or another reward; {last_checkpoint(self.run_dir)}"
            )
        return finite


class Rewarded(Method):
    """Holds what a method needs that samples trajectories and rewards their ends; it adds the rest of a Method.

    single_reward: whether it takes one score of an image alone.
    """

    stage = "rollout"
    single_reward = False

    def __init__(self, config: RewardedConfig, models: Models, prompts: TrainingPrompts, session: Session):
        """Frees the text encoders. Raises UserError for a reward that does not load."""
        self.config, self.models, self.prompts, self.ranks = config, models, prompts, session.ranks
        self.clock, self.counted = session.clock, session.live.counted
        self.policy, self.trainable = models.policy, models.trainable
        self.reward = Reward(config.reward, models, session.dir, self.single_reward)
        self.schedule = models.schedule(config.rollout)
        models.diffusion.release_text_encoders()
        device, seed = session.ranks.device, config.run.seed + session.ranks.rank
        self.rngs = {name: torch.Generator(device).manual_seed(seed) for name in ("rollout", "shuffle")}

    def learning_rate(self, iteration: int) -> float:
        """Returns the learning rate, which is constant, as published."""
        return self.config.optim.lr

    def rewards(self, latents: Tensor, iteration: int, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Returns M rewards (M, N) of clean latents (N, C, H, W), and which latents have finite ones, (N,) bool.

        They are those of this rank's prompts of an iteration, once or several times over; cond: of the N. Raises
        UserError if no reward of any rank is finite. A collective call.
        """
        with self.clock("rollout/decode"):
            images = self.models.diffusion.decode(latents)
        texts = self.prompts.texts(iteration)
        with self.clock("rollout/judge"):
            rewards = self.reward(images, texts * (len(latents) // len(texts)), cond)
        return rewards, self.reward.check(rewards, iteration, self.ranks)
