"""Typed, frozen configuration: a YAML file plus `key=value` overrides, checked in full before anything is loaded.

Every key has a description, a default where one makes sense, and bounds; docs/configuration.md is generated from here.
It does not know what the keys do: the modules that receive a section do.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from strop.engine.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Kernels = Literal["auto", "reference"]
KERNELS = "auto runs strop.kernels in Triton on a GPU; reference in plain PyTorch everywhere, to compare or to debug."


Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation in (int, float):
                raise ValueError(f"{name} is {str(value).lower()}, but must be a number")
        return values


class ModelConfig(Section):
    path: str = Field(description="Folder of the base model in diffusers format (Stable Diffusion 1.5 style).")
    dtype: Dtype = Field(
        "float32",
        description="Type of the frozen weights; the LoRA stays in float32. float16 is trained without loss scaling.",
    )


class JudgeConfig(Section):
    path: str = Field(description="Folder of the step-aware preference model, or of a plain CLIP / PickScore model.")


class PromptsConfig(Section):
    train: str = Field(description="Training prompts: a text file, one prompt a line.")
    heldout: str = Field(
        description="Prompts kept for the evaluation, in the same form; none may be a training prompt."
    )


class LoraConfig(Section):
    rank: int = Field(4, ge=1, description="Rank of the LoRA; alpha equals the rank, so its scale is 1.")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="UNet layers that get a LoRA (PEFT name suffixes).",
    )


class RolloutConfig(Section):
    prompts: int = Field(10, ge=1, description="Prompts per iteration and process.")
    k: int = Field(4, ge=2, description="Branches drawn from one noisy latent at each judged step.")
    num_steps: int = Field(20, ge=2, le=1000, description="DDIM steps of a rollout.")
    branch_from: int = Field(
        4, ge=0, description="First step index that branches; the steps before it are the trunk (t > kappa)."
    )
    eta: float = Field(1.0, gt=0, le=1, description="DDIM eta; 0 has no log-probability and is not allowed here.")
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale; 1 switches guidance off.")
    threshold: float = Field(0.3, ge=0, lt=1, description="A pair is kept when p(winner) - p(loser) exceeds this.")

    @model_validator(mode="after")
    def _branches_somewhere(self) -> RolloutConfig:
        if self.branch_from >= self.num_steps:
            raise ValueError(
                f"branch_from is {self.branch_from}, but must be smaller than num_steps = {self.num_steps}"
            )
        return self


class OptimConfig(Section):
    lr: float = Field(6e-5, gt=0, description="AdamW learning rate, constant.")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    beta: float = Field(10.0, gt=0, description="DPO beta: weight of the difference of the log-ratios.")
    clip: float = Field(0.1, gt=0, lt=1, description="Probability ratios are clamped to [1 - clip, 1 + clip].")
    micro_batch: int = Field(10, ge=1, description="Preference pairs per forward and backward pass and process.")
    accumulate: int = Field(1, ge=1, description="Micro-batches per optimizer step.")


class ZeroConfig(Section):
    stage: Literal[1, 2] = Field(
        1,
        description="DeepSpeed ZeRO stage with several processes: 1 shards the optimizer state, 2 also the gradients.",
    )


class EvaluateConfig(Section):
    prompts: int = Field(64, ge=1, description="Held-out prompts, from the top of prompts.heldout.")
    num_steps: int = Field(20, ge=1, le=1000, description="Deterministic DDIM steps (eta 0) per image.")
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale of the evaluation.")
    batch: int = Field(32, ge=1, description="Images per forward pass.")
    seed: int = Field(0, ge=0, description="Seed of the initial noise: base and tuned model get the same.")
    pictures: int = Field(10, ge=1, description="Columns of before_after.png.")
    examiner: str | None = Field(
        None,
        description="Independent examiner as `module:factory`: factory(device) gives examine(images, prompts) -> "
        "{name: (N,) scores}.",
    )


class RunConfig(Section):
    dir: str = Field(description="Run folder; must be new or empty, unless run.resume is set.")
    iterations: int = Field(ge=1, description="Rollouts, each followed by one pass over its preference pairs.")
    seed: int = Field(42, ge=0, description="Seed of everything random in the run; process r uses seed + r.")
    device: Device = Field("auto", description="auto takes a GPU where there is one.")
    kernels: Kernels = Field("auto", description=KERNELS)
    log_every: int = Field(1, ge=1, description="Iterations per line of metrics.jsonl and of the terminal.")
    save_every: int = Field(10, ge=1, description="Iterations per checkpoint; one more is written at the end.")
    resume: bool = Field(False, description="Go on from the newest checkpoint in run.dir.")


class Config(Section):
    """A recipe of engine/train.py."""

    model: ModelConfig
    judge: JudgeConfig
    prompts: PromptsConfig
    lora: LoraConfig = LoraConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig


class SpmDataConfig(Section):
    source: str = Field(
        description="Preference pairs as `module:factory`: factory(seed, size) gives a map-style dataset of "
        "{image_0, image_1: (3, H, W) in [-1, 1], caption, label_0, label_1}."
    )
    train: int = Field(ge=1, description="Training pairs.")
    heldout: int = Field(512, ge=1, description="Held-out pairs, drawn with another seed.")
    workers: int = Field(
        0, ge=0, description="Processes that load training pairs; 0 loads them in the training process."
    )


class SpmOptimConfig(Section):
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch: int = Field(16, ge=1, description="Pairs per step and process.")
    lr: float = Field(3e-6, gt=0, description="Peak AdamW learning rate.")
    weight_decay: float = Field(0.3, ge=0, description="AdamW weight decay.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up; a linear decay to zero follows.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    clean_share: float = Field(
        0.0, ge=0, lt=1, description="Share of pairs shown clean at t = 0 instead of noised (0 in the paper)."
    )
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale of the frozen base model.")

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> SpmOptimConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}, but must be smaller than steps = {self.steps}")
        return self


class SpmRunConfig(Section):
    dir: str = Field(description="Run folder; must be new or empty. The judge is written to its subfolder `judge`.")
    seed: int = Field(42, ge=0, description="Seed of everything random in the run; process r uses seed + r.")
    device: Device = Field("auto", description="auto takes a GPU where there is one.")
    kernels: Kernels = Field("auto", description=KERNELS)
    log_every: int = Field(20, ge=1, description="Steps per line of metrics.jsonl and of the terminal.")


class SpmConfig(Section):
    """A recipe of engine/train_spm.py."""

    model: ModelConfig
    judge: JudgeConfig
    data: SpmDataConfig
    optim: SpmOptimConfig
    zero: ZeroConfig = ZeroConfig(stage=2)
    run: SpmRunConfig


C = TypeVar("C", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = (), cls: type[C] = Config) -> C:
    """Reads a YAML recipe, applies `section.key=value` overrides (values are YAML) and checks the whole.

    Raises UserError with one sentence that names the file and the key.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(cls, error)}") from None


def dump(config: Section, path: Path) -> None:
    """Writes the resolved configuration, every default filled in, as YAML that `load` reads back equal."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a configuration class."""
    found = []
    for name, field in cls.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found += keys(nested, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def differences(old: Section, new: Section, ignore: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every dotted key outside `ignore` whose values differ."""

    def value(config: Any, dotted: str) -> Any:
        for part in dotted.split("."):
            config = getattr(config, part)
        return config

    return [
        f"{key}: {value(old, key)!r} -> {value(new, key)!r}"
        for key in keys(type(new))
        if key not in ignore and value(old, key) != value(new, key)
    ]


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the path of a recipe such as configs/tinyworld.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {type(tree).__name__}, expected sections such as `model:` and `run:`")
    return tree


def _apply(tree: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected section.key=value, such as optim.lr=1e-4")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or there and empty
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


def _sentence(cls: type[BaseModel], error: ValidationError) -> str:
    """The first of pydantic's complaints, as a sentence a person can act on."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        near = _nearest(cls, key)
        return (
            f"unknown key {key}; "
            + (f"did you mean {near}?" if near else "docs/configuration.md lists all keys")
            + more
        )
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}{more}"
    if first["type"] == "model_type":
        return f"{key}: found {first['input']!r}, expected keys and values, as docs/configuration.md has them{more}"
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Tuple should have ")
    return f"{key}: found {first['input']!r}, expected {expected.split(' after validation')[0]}{more}"


def _nearest(cls: type[BaseModel], key: str) -> str | None:
    """The key that was probably meant: the same word in another section, else the most similar."""
    word = key.rsplit(".", 1)[-1]
    elsewhere = [known for known in keys(cls) if known.rsplit(".", 1)[-1] == word]
    similar = difflib.get_close_matches(key, keys(cls) + ([] if "." in key else list(cls.model_fields)), n=1)
    return next(iter(elsewhere + similar), None)
