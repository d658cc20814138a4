"""The ops of strop as a library: functions on tensors, no parameters, no engine."""

from strop.kernels.adaln import adaln_modulate, gated_residual_adaln
from strop.kernels.ddim import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_x0_hat

__all__ = [
    "DDIMCoefficients",
    "adaln_modulate",
    "ddim_branch",
    "ddim_log_prob",
    "ddim_x0_hat",
    "gated_residual_adaln",
]
