"""What a recipe says of the machine's speed, done to the loaded models: section `model`, keys that change no result.

Every one of them leaves the numbers as they are but for rounding. The compiler's cache is PyTorch's own, which it keeps
between runs where TORCHINDUCTOR_CACHE_DIR says, or in the system's folder for temporary files. What saves work in the
order of things (rows at once, keys and values of the text) stands where that order is: policy.py, text_kv.py,
diffusion.py.
"""

from __future__ import annotations

import torch

from strop.engine.config import ModelConfig
from strop.engine.diffusion import LatentDiffusion
from strop.engine.policy import Policy
from strop.engine.preference import StepAwarePreferenceModel
from strop.engine.upsample import fold_upsamplers

GRAPHS = 64  # of one network: rollout, evaluation and update each have their own rows, with and without the LoRA


def prepare(
    model: ModelConfig, policy: Policy, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, micro_batch: int
) -> None:
    """Makes loaded models as fast as section `model` asks, in place; before the optimizer is made.

    micro_batch: pairs per forward of the update. Compiled, a UNet needs the same rows each time, so that the last
    micro-batch, and those of MSPO, are filled up to a multiple of it with copies whose result nobody reads.
    """
    if model.fold_upsample:
        fold_upsamplers(policy.unet)
        fold_upsamplers(diffusion.vae)
    if model.channels_last:
        policy.unet.to(memory_format=torch.channels_last)
        diffusion.vae.to(memory_format=torch.channels_last)
    if model.compile:
        policy.unet.compile(dynamic=False, recompile_limit=GRAPHS)
        policy.multiple = micro_batch
        diffusion.vae.decoder.compile(dynamic=False, recompile_limit=GRAPHS)
        judge.clip.compile_tower()
