"""The ops of strop as a library of functions on tensors, without parameters or engine; README.md shows each at work.

Where Triton is installed, importing this registers torch.ops.strop.*; backend.py decides which code answers a call.
"""

from .adaln import adaln_modulate, gated_residual_adaln
from .backend import TRITON, use_reference
from .ddim import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_log_ratio, ddim_x0_hat

if TRITON:
    from . import adaln_triton, ddim_triton, log_prob_triton  # noqa: F401

__all__ = [
    "DDIMCoefficients",
    "adaln_modulate",
    "ddim_branch",
    "ddim_log_prob",
    "ddim_log_ratio",
    "ddim_x0_hat",
    "gated_residual_adaln",
    "use_reference",
]
