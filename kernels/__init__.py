"""The ops of strop as a library of functions on tensors, without parameters or engine; README.md shows each at work.

Where Triton is installed and can run, on a GPU or in its interpreter, importing this registers torch.ops.strop.*, and
backend.py decides which code answers a call. Without CUDA, a start is spared the seconds that registering takes.
"""

import torch

from .adaln import adaln_modulate, gated_residual_adaln
from .backend import INTERPRETED, TRITON, use_reference
from .ddim import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_log_ratio, ddim_x0_hat

if TRITON and (INTERPRETED or torch.backends.cuda.is_built()):
    from . import adaln_triton, ddim_triton  # noqa: F401

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
