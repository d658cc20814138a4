"""Loads the judge that a recipe names, of whichever kind."""

from __future__ import annotations

import torch

from ..config.training import JudgeConfig
from ..models.latent_diffusion import LatentDiffusion
from . import latent_files
from .latent import LatentJudge
from .model import StepAwarePreferenceModel

AnyJudge = StepAwarePreferenceModel | LatentJudge


def load_judge(judge: JudgeConfig, diffusion: LatentDiffusion, dtype: torch.dtype) -> AnyJudge:
    """Loads a judge of the kind judge.kind, frozen; dtype: of a latent judge. Raises UserError that names the key."""
    if judge.kind == LatentJudge.kind:
        return latent_files.load(judge, diffusion, dtype)
    return StepAwarePreferenceModel.load(judge, diffusion.device)
