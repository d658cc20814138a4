"""Loads the judge that a recipe names, of whichever kind."""

from __future__ import annotations

import re

import torch

from ..config.training import JudgeConfig
from ..errors import UserError
from ..models.latent_diffusion import LatentDiffusion
from . import latent_files
from .latent import LatentJudge
from .model import StepAwarePreferenceModel

AnyJudge = StepAwarePreferenceModel | LatentJudge
KEY = re.compile(r"\bjudge\.(?=(path|kind|guidance|components|revision)\b)")  # in what a loader says


def load_judge(judge: JudgeConfig, diffusion: LatentDiffusion, dtype: torch.dtype) -> AnyJudge:
    """Loads a judge of the kind judge.kind, frozen; dtype: of a latent judge. Raises UserError that names the key."""
    if judge.kind == LatentJudge.kind:
        return latent_files.load(judge, diffusion, dtype)
    return StepAwarePreferenceModel.load(judge, diffusion.device)


def load_auditor(audit: JudgeConfig, diffusion: LatentDiffusion, dtype: torch.dtype) -> AnyJudge:
    """Does as `load_judge` with the section `audit` of a recipe, whose keys its errors name."""
    try:
        return load_judge(audit, diffusion, dtype)
    except UserError as error:
        raise UserError(KEY.sub("audit.", str(error))) from None
