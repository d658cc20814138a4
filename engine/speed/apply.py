"""Applies the speed keys of section `model` to loaded networks.

Each key changes numbers only by rounding; tf32 rounds to ten bits, in the judge, as published. PyTorch keeps compiled
code between runs in TORCHINDUCTOR_CACHE_DIR, or in the system's folder for temporary files. Savings that depend on the
order of computations (rows per forward, text keys and values, shared guidance halves, a merged LoRA) are applied in
models/guided_unet.py, models/policy.py and models/latent_diffusion.py.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config.training import ModelConfig
from .lora_linear import make_loras_lean
from .residual import make_residuals_lean
from .upsample import fold_upsamplers

GRAPHS = 64  # limit per network: rollout, evaluation and update have their own row counts, with and without LoRA


def prepare(model: ModelConfig, unet: nn.Module, vae: nn.Module, judge: nn.Module) -> None:
    """Applies section `model` to loaded networks in place; to be called before the optimizer is created.

    TF32 and the limit of compiled graphs are settings of PyTorch for the whole process.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = model.uses_tf32
    remove_idle_work(unet, vae, model.fold_upsample)
    if model.channels_last:
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)
    if model.compile:
        limits = torch._dynamo.config  # compile() takes a limit of its own from PyTorch 2.13 on
        limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
        for network in (unet, vae.decoder, judge) if model.compile == "all" else (vae.decoder, judge):
            network.compile(dynamic=False)


def remove_idle_work(unet: nn.Module, vae: nn.Module, fold_upsample: bool) -> None:
    """Removes work from networks in place; numbers change only by rounding. `strop plan` counts networks after this."""
    make_loras_lean(unet)
    for network in (unet, vae):
        make_residuals_lean(network)
        if fold_upsample:
            fold_upsamplers(network)
