"""Builds the schedule of stochastic DDIM."""

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
    """Builds the schedule from a scheduler's betas and prediction type, with "leading" spacing as published.

    A steps_offset of 0 becomes 1: a last step from t = 0 would have no noise, and so no density.
    """
    config = scheduler.config
    offset = max(1, config.steps_offset)
    coefficients = DDIMCoefficients.build(scheduler.alphas_cumprod, num_steps, eta, config.prediction_type, offset)
    return Schedule(coefficients, guidance, device)
