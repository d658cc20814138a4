"""Adds a LoRA to a UNet and reads or replaces its tensors, by PEFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor


def add_lora(unet: UNet2DConditionModel, rank: int, target_modules: Sequence[str] | str, seed: int) -> None:
    """Adds a fresh LoRA: A ~ N(0, 1/rank^2) from `seed`, B = 0, alpha = rank, so that the UNet computes as before.

    target_modules: endings of the names of layers, or a regular expression for whole names. Raises ValueError if no
    layer has such a name.
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = PeftLoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        unet.add_adapter(config)


def lora_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Returns the LoRA's tensors under PEFT names."""
    return get_peft_model_state_dict(unet)


def set_lora_state(unet: UNet2DConditionModel, state: dict[str, Tensor]) -> None:
    """Replaces the LoRA's tensors by those of `lora_state`."""
    set_peft_model_state_dict(unet, state)
