"""What the recipes of all methods have that learn from labelled pairs of images and sample nothing while they train."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .pairs import PairsConfig
from .training import PROMPT_FILE, Config, Count, HeldoutConfig, OptimConfig, RunConfig


class EvaluationPromptsConfig(HeldoutConfig):
    heldout: str = Field(description=f"File of prompts for the evaluation: {PROMPT_FILE}")


class OfflineDataConfig(PairsConfig):
    flip: Literal["none", "shared", "independent"] = Field(
        "shared",
        description="Whether images are flipped horizontally, with probability one half: shared draws once for both "
        "images of a pair, independent for each. In the cache, flipped images take as much room again.",
    )


class OfflineOptimConfig(OptimConfig):
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay, which pulls the LoRA towards 0.")
    micro_batch: Count = Field(
        8, description="Pairs per backward pass and process, each of two latents; fewer take less memory."
    )
    accumulate: Count = Field(1, description="Micro-batches per optimizer step.")
    warmup: int = Field(
        0, ge=0, description="Optimizer steps over which the learning rate rises linearly; then it is constant."
    )


class OfflineRunConfig(RunConfig):
    iterations: int = Field(ge=1, description="Optimizer steps.")


class OfflineConfig(Config):
    """A recipe of a method that learns from labelled pairs. The judge scores the evaluation, and trains nothing.

    tells_crops: whether a UNet with time_ids is told the sizes and crops of the images, or those of a whole image.
    """

    tells_crops: ClassVar[bool] = False

    prompts: EvaluationPromptsConfig
    data: OfflineDataConfig
    optim: OfflineOptimConfig = OfflineOptimConfig()
    run: OfflineRunConfig

    @property
    def pairs_per_iteration(self) -> int:
        """The pairs that a process learns from in an iteration, which is an optimizer step."""
        return self.optim.micro_batch * self.optim.accumulate

    @property
    def drop_prompts(self) -> float:
        """The share of pairs that are trained on without their prompt."""
        return 0.0

    @property
    def files_read(self) -> dict[str, str]:
        """Files or folders of data that the run reads, by key."""
        only = {"data.only": self.data.only} if self.data.only else {}
        return {"data.source": self.data.source} | only | super().files_read

    def in_words(self, ranks: int) -> str:
        """Returns what an iteration does, as a run announces it."""
        pairs = f"{self.pairs_per_iteration} pairs" if ranks == 1 else f"{ranks} x {self.pairs_per_iteration} pairs"
        return f"{self.run.iterations} iterations of {pairs}"
