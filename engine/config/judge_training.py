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


class TrainedJudgeConfig(JudgeConfig):
    path: str | None = Field(
        None,
        description="What the judge begins as: for kinds spm and spm_no_step a PickScore or CLIP or a judge of that "
        "kind; for kind latent a latent judge, or null for the UNet's encoder and the text encoders of model.path.",
    )
    components: str | None = Field(
        None,
        description="Folder or hub id of the CLIP whose config.json, preprocessor and tokenizer go with judge.path; "
        "null if judge.path has its own. Of a fresh latent judge of SD-1.5: the CLIP whose text projection it begins "
        "with, such as openai/clip-vit-large-patch14; null begins with the identity.",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        description="Of a latent judge: guidance scale of its middle feature, 7.5 for LPO's; 1 leaves out the half "
        "without the prompt and half of the cost. null takes that of judge.path, or 1.",
    )
    dtype: Literal["float32"] | None = Field(None, description="Type of the weights that are trained.")
    lora_rank: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Of a latent judge: trains a LoRA of this rank on the frozen base model's encoder, so that the "
        "judge is megabytes and shares the policy's weights in memory; null trains the encoder itself.",
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TrainedJudgeConfig:
        if self.kind != "latent":
            for key in ("guidance", "lora_rank"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(f"{key} is {value}, but only a judge of kind latent has it; leave it out")
            if self.path is None:
                raise ValueError(f"path is null, but a judge of kind {self.kind} begins as a PickScore or CLIP")
        return self


class LabellerConfig(Section):
    path: str | None = Field(
        None,
        description="The judge of decoded images that makes the labels where data.labels asks for it: PickScore, or a "
        "folder written by engine/train_judge.py; null takes that of section judge.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    components: str | None = Field(None, description="As judge.components, for this judge.")
    kind: Literal["pickscore", "spm", "spm_no_step"] = Field(
        "pickscore", description="What it is, as judge.kind; a step-aware judge is asked at t = 0."
    )


class JudgeTrainingDataConfig(PairsConfig):
    heldout_source: str | None = Field(
        None,
        description="Held-out pairs, in the same forms; their captions are not trained on. null splits data.heldout "
        "pairs off data.source by caption, or asks a factory with another seed.",
    )
    heldout: int = Field(512, ge=1, le=10**6, description="Most held-out pairs; accuracy is measured on them.")
    labels: Literal["given", "pickscore", "distilled"] = Field(
        "given",
        description="Where labels come from: given takes those of the data; pickscore lets the labeller, or a plain "
        "PickScore as judge.path, say which image wins; distilled takes the labeller's probabilities themselves.",
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
    guidance: float = Field(
        5.0,
        ge=1,
        description="Classifier-free guidance scale of the frozen base model, which shows pairs to a judge of decoded "
        "images.",
    )
    num_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Pairs are noised to the timesteps of a sampler of so many steps (20: 1, 51, ..., 951), as LPO's; "
        "null draws from 0..999, as SPO's.",
    )
    shared_noise: bool | None = Field(
        None,
        description="Whether both images of a pair get the same noise. null: they do for a judge of decoded images, as "
        "published, and do not for a latent judge, which would read their difference through the noise.",
    )

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
    judge: TrainedJudgeConfig
    labeller: LabellerConfig = LabellerConfig()
    data: JudgeTrainingDataConfig
    optim: JudgeTrainingOptimConfig
    zero: ZeroConfig = ZeroConfig(stage=2)
    run: JudgeTrainingRunConfig

    @model_validator(mode="after")
    def _has_the_labeller_it_needs(self) -> JudgeTrainingConfig:
        labels, path = self.data.labels, self.labeller.path
        if labels == "given" and path is not None:
            raise ValueError(f"labeller.path is {path}, but data.labels is given; set it to pickscore or distilled")
        if path is None and (labels == "distilled" or (labels == "pickscore" and self.judge.kind == "latent")):
            raise ValueError(f"data.labels is {labels}, but labeller.path is null; name the judge that makes them")
        return self

    @property
    def noise_is_shared(self) -> bool:
        """Whether both images of a pair get the same noise."""
        return self.judge.kind != "latent" if self.optim.shared_noise is None else self.optim.shared_noise

    @property
    def iterations(self) -> int:
        """The number of iterations of the run, each of which is one optimizer step."""
        return self.optim.steps
