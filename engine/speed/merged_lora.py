"""The LoRA as a part of the weights while the policy is sampled: W + BA in place of W, so that no adapter runs.

In float32 the outputs are the same but for rounding; a shorter type rounds the sum to itself. Only LoRAs that are
nothing but a sum of weights can be merged; where a model has one that is more, all of them run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora_linear import LeanLora


@contextmanager
@torch.no_grad()
def merged_lora(model: nn.Module) -> Iterator[bool]:
    """Inside, every LoRA of the model is part of its weight; afterwards the weight is what it was, bit for bit.

    Gives whether that is so. Where one LoRA cannot be merged, or they are switched off, the model stays as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers if can_be_merged(layer)]
    if len(set(map(id, weights))) < len(layers):  # some cannot, or two of them share a weight
        yield False
        return
    former = [weight.clone() for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight += layer.get_delta_weight(layer.active_adapters[0])
        for layer in layers:
            layer.enable_adapters(False)
        yield True
    finally:
        for weight, own in zip(weights, former, strict=True):
            weight.copy_(own)
        for layer in layers:
            layer.enable_adapters(True)


def can_be_merged(layer: nn.Module) -> bool:
    """Whether it is PEFT's linear layer with one LoRA that is on, without bias or variant such as DoRA."""
    if type(layer) not in (Linear, LeanLora) or type(layer.get_base_layer()) is not nn.Linear:
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name in layer.lora_B and layer.lora_B[name].bias is None and name not in layer.lora_variant
