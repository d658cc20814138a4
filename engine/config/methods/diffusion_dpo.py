"""The recipe of Diffusion-DPO, with its authors' values."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..offline import OfflineConfig, OfflineDataConfig, OfflineOptimConfig
from ..training import Count


class DiffusionDPODataConfig(OfflineDataConfig):
    flip: Literal["none", "shared", "independent"] = Field(
        "independent", description=OfflineDataConfig.model_fields["flip"].description
    )
    drop_prompts: float = Field(
        0.2, ge=0, le=1, description="Share of the pairs that are trained on with an empty text for their prompt."
    )


class DiffusionDPOOptimConfig(OfflineOptimConfig):
    lr: float = Field(
        2.05e-5,
        gt=0,
        description="AdamW learning rate after the warm-up: the authors' 1e-8 for each of the 2048 pairs of a step, at "
        "which they train all weights. A LoRA may take a larger one.",
    )
    accumulate: Count = Field(256, description="Micro-batches per optimizer step; the authors' steps have 2048 pairs.")
    warmup: int = Field(500, ge=0, description=OfflineOptimConfig.model_fields["warmup"].description)
    beta: float = Field(
        5000.0, gt=0, description="DPO beta: half of it is the weight of the difference of the errors' changes."
    )
    discount: float | None = Field(
        None,
        gt=0,
        le=1,
        description="DenseReward's temporal discount (arXiv 2402.08265): a timestep is drawn with probability "
        "proportional to discount^i, where i counts the steps of a sampler of 50 from the noisiest. null draws all "
        "timesteps alike.",
    )


class DiffusionDPOConfig(OfflineConfig):
    """A recipe of Diffusion-DPO (arXiv 2311.12908)."""

    name: ClassVar[str] = "Diffusion-DPO"
    title: ClassVar[str] = "direct preference optimization of diffusion models (Diffusion-DPO, arXiv 2311.12908)"
    code: ClassVar[str] = "diffusion_dpo:DiffusionDPO"

    method: Literal["diffusion_dpo"] = Field("diffusion_dpo", description="This method.")
    data: DiffusionDPODataConfig
    optim: DiffusionDPOOptimConfig = DiffusionDPOOptimConfig()

    @property
    def drop_prompts(self) -> float:
        """The share of pairs that are trained on without their prompt."""
        return self.data.drop_prompts
