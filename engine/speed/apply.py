"""What a recipe says of the machine's speed, done to the loaded models: section `model`, keys that change no result.

Every one of them leaves the numbers as they are but for rounding; with tf32 that is to ten bits in the judge, as
published. The compiler's cache is PyTorch's own, which it keeps between runs where TORCHINDUCTOR_CACHE_DIR says, or in
the system's folder for temporary files. What saves work in the order of things (rows at once, keys and values of the
text, shared guidance halves, a merged LoRA) stands where that order is: models/, text_kv.py, shared_halves.py,
merged_lora.py.
"""

from __future__ import annotations

import torch
from torch import nn

from ..config.training import ModelConfig
from .lora_linear import make_loras_lean
from .residual import make_residuals_lean
from .upsample import fold_upsamplers

GRAPHS = 64  # of one network: rollout, evaluation and update each have their own rows, with and without the LoRA


def prepare(model: ModelConfig, unet: nn.Module, vae: nn.Module, judge: nn.Module) -> None:
    """Makes loaded networks as fast as section `model` asks, in place; before the optimizer is made.

    TF32 is a setting of PyTorch, for the whole process.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = model.uses_tf32
    make_lean(unet, vae, model.fold_upsample)
    if model.channels_last:
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)
    if model.compile:
        unet.compile(dynamic=False, recompile_limit=GRAPHS)
        vae.decoder.compile(dynamic=False, recompile_limit=GRAPHS)
        judge.compile(dynamic=False)


def make_lean(unet: nn.Module, vae: nn.Module, fold_upsample: bool) -> None:
    """Takes out of networks, in place, the work that changes no number but for rounding; plan counts them so."""
    make_loras_lean(unet)
    for network in (unet, vae):
        make_residuals_lean(network)
        if fold_upsample:
            fold_upsamplers(network)
