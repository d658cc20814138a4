"""The recipe of engine/train_judge.py, which trains the judge: every key with its meaning, default and bounds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .pairs import PairsConfig
from .settings import Section
from .training import (
    KERNELS,
    RANK_TIMEOUT,
    RESUME,
    TRACKER,
    Count,
    Device,
    JudgeConfig,
    Kernels,
    ModelConfig,
    Resume,
    Seed,
    Tracker,
    ZeroConfig,
)


class JudgeTrainingDataConfig(PairsConfig):
    heldout_source: str | None = Field(
        None,
        description="Held-out pairs, in the same forms; their captions are not trained on. null splits data.heldout "
        "pairs off data.source by caption, or asks a factory with another seed.",
    )
    heldout: int = Field(512, ge=1, le=10**6, description="Most held-out pairs; accuracy is measured on them.")
    labels: Literal["given", "pickscore"] = Field(
        "given",
        description="Where labels come from: given takes those of the data; pickscore lets judge.path, which is then a "
        "plain PickScore, make them.",
    )
    tie: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Difference of the two probabilities up to which labels by pickscore are ties.",
    )


class JudgeTrainingOptimConfig(Section):
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch: Count = Field(16, description="Pairs per forward and backward pass and process.")
    accumulate: Count = Field(1, description="Batches per optimizer step.")
    lr: float = Field(3e-6, gt=0, description="Peak AdamW learning rate.")
    weight_decay: float = Field(0.3, ge=0, description="AdamW weight decay.")
    warmup: int = Field(
        0, ge=0, description="Optimizer steps over which the learning rate rises, before it falls linearly to zero."
    )
    warmup_shape: Literal["linear", "log"] = Field(
        "linear", description="Shape of the rise; log is the rule of DeepSpeed's WarmupDecayLR, as published."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    clean_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of pairs that the judge sees clean, at t = 0, instead of noised; 0 in the paper.",
    )
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale of the frozen base model.")

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> JudgeTrainingOptimConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}, but must be smaller than steps = {self.steps}")
        return self


class JudgeTrainingRunConfig(Section):
    dir: str = Field(
        description="Run folder, which must be new or empty unless run.resume is set. The judge goes to its subfolder "
        "`judge`."
    )
    seed: Seed = Field(42, description="Seed of everything random in the run; process r uses seed + r.")
    device: Device = Field("auto", description="Where the run computes; auto takes a GPU where there is one.")
    kernels: Kernels = Field("auto", description=KERNELS)
    log_every: int = Field(20, ge=1, description="Steps per line of metrics.jsonl and of the terminal.")
    tracker: Tracker = Field("tensorboard", description=TRACKER)
    save_every: int = Field(500, ge=1, description="Steps per checkpoint.")
    keep: int | None = Field(
        2, ge=1, description="How many of the newest checkpoints stay (PickScore's take 12 GB each); null keeps all."
    )
    resume: Resume = Field(False, description=RESUME)
    rank_timeout: int = Field(600, ge=5, description=RANK_TIMEOUT)


class JudgeTrainingConfig(Section):
    """A recipe of engine/train_judge.py."""

    model: ModelConfig
    judge: JudgeConfig
    data: JudgeTrainingDataConfig
    optim: JudgeTrainingOptimConfig
    zero: ZeroConfig = ZeroConfig(stage=2)
    run: JudgeTrainingRunConfig

    @property
    def iterations(self) -> int:
        """The number of iterations of the run, each of which is one optimizer step."""
        return self.optim.steps
