"""The recipe of MaPO, with its authors' values."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..offline import OfflineConfig, OfflineOptimConfig
from ..training import Count, LoraConfig


class MaPOOptimConfig(OfflineOptimConfig):
    lr: float = Field(1e-5, gt=0, description="AdamW learning rate after the warm-up.")
    accumulate: Count = Field(2, description=OfflineOptimConfig.model_fields["accumulate"].description)
    beta: float = Field(0.1, gt=0, description="Weight of the preference, beside the error of the winner.")


class MaPOConfig(OfflineConfig):
    """A recipe of margin-aware preference optimization (MaPO, arXiv 2406.06424)."""

    name: ClassVar[str] = "MaPO"
    title: ClassVar[str] = "margin-aware preference optimization (MaPO, arXiv 2406.06424)"
    code: ClassVar[str] = "mapo:MaPO"
    tells_crops: ClassVar[bool] = True

    method: Literal["mapo"] = Field("mapo", description="This method.")
    lora: LoraConfig = LoraConfig(rank=8)
    optim: MaPOOptimConfig = MaPOOptimConfig()
