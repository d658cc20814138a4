"""The recipe of D3PO, with its authors' values."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..online import RewardedConfig
from ..training import Count, OptimConfig


class D3POOptimConfig(OptimConfig):
    lr: float = Field(3e-5, gt=0, description="AdamW learning rate, constant.")
    micro_batch: Count = Field(
        10,
        description="Steps of pairs of trajectories per backward pass and process, each of two latents; fewer take "
        "less memory. It divides the steps of optim.pairs pairs.",
    )
    pairs: Count = Field(
        1,
        description="Pairs of trajectories per optimizer step and process, with all of their steps; a divisor of "
        "rollout.prompts.",
    )
    beta: float = Field(0.1, gt=0, description="DPO beta: weight of the difference of the log-ratios.")
    clip: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Probability ratios are clamped to [1 - clip, 1 + clip]; with optim.discount, log-ratios to "
        "[-clip, clip].",
    )
    guided: bool = Field(
        True,
        description="Whether the guided prediction (rollout.guidance) is trained, or the one with the prompt alone.",
    )
    discount: float | None = Field(
        None,
        gt=0,
        le=1,
        description="DenseReward's temporal discount (arXiv 2402.08265): an optimizer step sees optim.draws steps, "
        "drawn with probability proportional to discount^i, where i = 0 is the noisiest, and compares the mean of "
        "their log-ratios. Its authors take 0.9 with beta 10 and clip 1e-4. null trains on every step by itself.",
    )
    draws: Count = Field(
        3, description="Steps that are drawn, with replacement, for an optimizer step; without optim.discount unused."
    )


class D3POConfig(RewardedConfig):
    """A recipe of direct preference for denoising diffusion policy optimization (D3PO, arXiv 2311.13231)."""

    name: ClassVar[str] = "D3PO"
    title: ClassVar[str] = "direct preference for denoising diffusion policy optimization (D3PO, arXiv 2311.13231)"
    code: ClassVar[str] = "d3po:D3PO"

    method: Literal["d3po"] = Field("d3po", description="This method.")
    optim: D3POOptimConfig = D3POOptimConfig()

    @property
    def rows_per_step(self) -> int:
        """How many steps of pairs an optimizer step is computed from, on each process."""
        return self.optim.pairs * (self.optim.draws if self.optim.discount else self.rollout.num_steps)

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self.rows_per_step // self.optim.micro_batch

    @property
    def guided_update(self) -> bool:
        """Whether the update computes both guidance halves."""
        return self.optim.guided and super().guided_update

    @model_validator(mode="after")
    def _parts_are_whole(self) -> D3POConfig:
        rows, size, whole = self.rows_per_step, self.optim.micro_batch, self.optim.draws if self.optim.discount else 1
        if rows % size or size % whole:
            divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0 and n % whole == 0)
            raise ValueError(
                f"optim.micro_batch is {size}, expected one of {divisors}, so that the {rows} steps of an optimizer "
                "step make whole micro-batches"
            )
        if self.rollout.prompts % self.optim.pairs:
            raise ValueError(
                f"optim.pairs is {self.optim.pairs}, expected a divisor of rollout.prompts = {self.rollout.prompts}"
            )
        return self
