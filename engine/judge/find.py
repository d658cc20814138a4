"""Loads the judge that a recipe names, of whichever kind."""

from __future__ import annotations

from ..config.training import JudgeConfig, ModelConfig
from ..models.base_model import dtype_on
from ..models.latent_diffusion import LatentDiffusion
from . import latent_files
from .latent import LatentJudge
from .model import StepAwarePreferenceModel

AnyJudge = StepAwarePreferenceModel | LatentJudge


def load_judge(judge: JudgeConfig, model: ModelConfig, diffusion: LatentDiffusion) -> AnyJudge:
    """Loads a judge of the kind judge.kind, frozen; diffusion: of `model`. Raises UserError that names the key."""
    if judge.kind == LatentJudge.kind:
        dtype = dtype_on(diffusion.device, judge.computed_in(model), "judge.dtype")
        return latent_files.load(judge, diffusion, dtype)
    return StepAwarePreferenceModel.load(judge, diffusion.device)
