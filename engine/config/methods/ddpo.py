"""The recipe of DDPO, with its authors' values."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..online import RewardedConfig, SamplingConfig
from ..training import Count, OptimConfig


class DDPORolloutConfig(SamplingConfig):
    prompts: Count = Field(256, description="Prompts per iteration and process; each gets one trajectory.")
    num_steps: int = Field(50, ge=2, le=1000, description="DDIM steps of a trajectory.")


class DDPOOptimConfig(OptimConfig):
    lr: float = Field(3e-4, gt=0, description="AdamW learning rate, constant.")
    micro_batch: Count = Field(
        10,
        description="Steps of trajectories per backward pass and process; fewer take less memory. It divides the steps "
        "of an update's trajectories.",
    )
    updates: Count = Field(
        4, description="Optimizer steps per iteration, each on as many of its trajectories; divides rollout.prompts."
    )
    clip: float = Field(
        1e-4, gt=0, lt=1, description="Range beyond 1 from which a probability ratio has no gradient (PPO's clip)."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Advantages are clamped to [-advantage_clip, advantage_clip].")
    history: int | None = Field(
        16,
        ge=1,
        le=10_000,
        description="Rewards of a prompt that are remembered: its advantages are relative to their mean and standard "
        "deviation. null always takes those of the iteration.",
    )
    min_history: int = Field(
        16, ge=1, description="Remembered rewards of a prompt below which those of the whole iteration are taken."
    )


class DDPOConfig(RewardedConfig):
    """A recipe of denoising diffusion policy optimization (DDPO, arXiv 2305.13301)."""

    name: ClassVar[str] = "DDPO"
    title: ClassVar[str] = "denoising diffusion policy optimization (DDPO, arXiv 2305.13301)"
    code: ClassVar[str] = "ddpo:DDPO"

    method: Literal["ddpo"] = Field("ddpo", description="This method.")
    rollout: DDPORolloutConfig = DDPORolloutConfig()
    optim: DDPOOptimConfig = DDPOOptimConfig()

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self.rollout.prompts * self.rollout.num_steps // self.optim.updates // self.optim.micro_batch

    @model_validator(mode="after")
    def _parts_are_whole(self) -> DDPOConfig:
        prompts, updates, size = self.rollout.prompts, self.optim.updates, self.optim.micro_batch
        if prompts % updates:
            raise ValueError(f"optim.updates is {updates}, expected a divisor of rollout.prompts = {prompts}")
        rows = prompts // updates * self.rollout.num_steps
        if rows % size:
            raise ValueError(
                f"optim.micro_batch is {size}, expected a divisor of {rows}, the steps of an update's trajectories"
            )
        if self.optim.history and self.optim.min_history > self.optim.history:
            raise ValueError(
                f"optim.min_history is {self.optim.min_history}, expected at most optim.history = {self.optim.history}"
            )
        return self
