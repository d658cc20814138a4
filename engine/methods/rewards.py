"""Rewards of finished images, by the judge or by any scorer, for methods that compare trajectories by their end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config.online import JUDGE
from ..errors import UserError
from ..models.conditioning import Conditioning
from ..runtime.checkpoint import last_checkpoint
from ..runtime.columns import Column, Curve, Trend
from ..runtime.ranks import Ranks, gather_rows
from ..scorers.find import load_scorer
from ..scorers.scorer import levels
from .models import Models

REWARD = Column(
    "reward",
    heading="reward",
    form="{:.4g}",
    drawn=Curve("Reward", "healthy: rises, then levels off"),
    trend=Trend("the reward", "up"),
)


class Reward:
    """Scores the images that latents decode to, as a PNG would store them, in 8 bits."""

    def __init__(self, spec: str, models: Models, run_dir: Path, single: bool = False):
        """spec: "judge", or a scorer as evaluate.scorers names them; single: whether it must give one score alone.

        Raises UserError for a scorer that does not load.
        """
        self.single = single
        self.spec, self.diffusion, self.judge, self.run_dir = spec, models.diffusion, models.judge, run_dir
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
