"""The schedule of stochastic DDIM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...kernels import DDIMCoefficients
from .schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


def ddim_schedule(
    scheduler: DDIMScheduler, num_steps: int, eta: float, guidance: float, device: torch.device | str
) -> Schedule:
    """That of the betas and the prediction type of a scheduler, with "leading" spacing as published.

    A steps_offset of 0 becomes 1: from t = 0 the last step would have no noise, and so no density.
    """
    config = scheduler.config
    offset = max(1, config.steps_offset)
    coefficients = DDIMCoefficients.build(scheduler.alphas_cumprod, num_steps, eta, config.prediction_type, offset)
    return Schedule(coefficients, guidance, device)
