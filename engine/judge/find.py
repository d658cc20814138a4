"""Loads, begins and saves the judge that a recipe names, of whichever kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ..config.judge_training import JudgeTrainingConfig
from ..config.training import JudgeConfig, ModelConfig
from ..errors import UserError
from ..models.base_model import dtype_on
from ..models.latent_diffusion import LatentDiffusion
from . import latent_files
from .latent import LatentJudge
from .model import StepAwarePreferenceModel

AnyJudge = StepAwarePreferenceModel | LatentJudge
KEY = re.compile(r"\bjudge\.(?=(path|kind|guidance|components|revision|dtype)\b)")  # in what a loader says


def load_judge(
    judge: JudgeConfig, model: ModelConfig, diffusion: LatentDiffusion, unet: UNet2DConditionModel
) -> AnyJudge:
    """Loads a judge of the kind judge.kind, frozen. Raises UserError that names the key.

    diffusion: of `model`; unet: the base model's, as it is loaded.
    """
    if judge.kind == LatentJudge.kind:
        dtype = dtype_on(diffusion.device, judge.computed_in(model), "judge.dtype")
        return latent_files.load(judge, diffusion, unet, dtype)
    return StepAwarePreferenceModel.load(judge, diffusion.device)


def load_auditor(
    audit: JudgeConfig, model: ModelConfig, diffusion: LatentDiffusion, unet: UNet2DConditionModel
) -> AnyJudge:
    """Does as `load_judge` with the section `audit` of a recipe, whose keys its errors name."""
    with keys_of("audit"):
        return load_judge(audit, model, diffusion, unet)


def begin_judge(config: JudgeTrainingConfig, diffusion: LatentDiffusion) -> AnyJudge:
    """Returns the judge with which a training begins, on the device. Raises UserError that names the key."""
    rng = torch.Generator().manual_seed(config.run.seed)
    if config.judge.kind == LatentJudge.kind:
        return latent_files.begin(config.judge, config.model, diffusion, rng)
    return StepAwarePreferenceModel.load(config.judge, diffusion.device, rng)


def load_labeller(config: JudgeTrainingConfig, judge: AnyJudge) -> StepAwarePreferenceModel | None:
    """Returns the judge of decoded images that makes a training's labels; None where they are given.

    judge: the one with which the training begins. Raises UserError if that shall make them and is no plain PickScore.
    """
    if config.data.labels == "given":
        return None
    labeller = config.labeller
    if labeller.path is None:
        if not judge.is_plain:
            raise UserError(
                f"data.labels: pickscore needs a plain PickScore as judge.path, and {config.judge.path} is a judge "
                "already trained; begin from PickScore, name a labeller.path, or use the given labels"
            )
        return judge
    with keys_of("labeller"):
        return StepAwarePreferenceModel.load(JudgeConfig(**labeller.model_dump()), judge.device)


def save_judge(judge: AnyJudge, folder: Path) -> None:
    """Writes a folder that `load_judge` reads."""
    if judge.kind == LatentJudge.kind:
        latent_files.save(folder, judge)
    else:
        judge.save(folder)


@contextmanager
def keys_of(section: str) -> Iterator[None]:
    """Names the keys of this section of a recipe in errors that name those of `judge`."""
    try:
        yield
    except UserError as error:
        raise UserError(KEY.sub(f"{section}.", str(error))) from None
