"""The recipe of GradSPO: SPO's rollout with a regression onto a target in place of log-probabilities."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .spo import RolloutConfig, SPOConfig, SPOOptimConfig


class GradSPORolloutConfig(RolloutConfig):
    inner_steps: Literal[1] = Field(1, description="Steps that a branch walks before it is judged.")
    merge_last: Literal[False] = Field(False, description="Unused, as every segment is one step.")


class GradSPOOptimConfig(SPOOptimConfig):
    strength: float = Field(
        0.5, gt=0, description="How far a target lies from the average policy's prediction, in units of the noise."
    )
    ema: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Decay, by optimizer step, of the average of the policy's weights; it samples, and gives targets.",
    )


class GradSPOConfig(SPOConfig):
    """A recipe of GradSPO."""

    name: ClassVar[str] = "GradSPO"
    title: ClassVar[str] = "GradSPO, SPO's rollout with a regression onto targets beside the prediction"
    code: ClassVar[str] = "gradspo:GradSPO"

    method: Literal["gradspo"] = Field("gradspo", description="This method.")
    rollout: GradSPORolloutConfig = GradSPORolloutConfig()
    optim: GradSPOOptimConfig = GradSPOOptimConfig()
