"""Merges the LoRA into the weights while the policy is sampled: W + BA replaces W, so that no adapter runs.

In float32 the outputs are the same up to rounding; a 16-bit type rounds the sum. Only LoRAs that just add to weights
can be merged; if a model has any other, none is merged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora_linear import LeanLora


@contextmanager
@torch.no_grad()
def merged_lora(model: nn.Module) -> Iterator[bool]:
    """Opens a context in which every LoRA of the model is merged into its weight; on exit all weights are as before.

    It yields whether they are merged. If one LoRA cannot be merged or is switched off, the model is left unchanged.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers if can_be_merged(layer)]
    if len(set(map(id, weights))) < len(layers):  # some cannot, or two of them share a weight
        yield False
        return
    original_weights = [weight.data for weight in weights]  # others, such as a judge's LoRA, may be based on them
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight.data = (weight + layer.get_delta_weight(layer.active_adapters[0])).to(weight.dtype)
        switch(layers, False)
        yield True
    finally:
        for weight, original in zip(weights, original_weights, strict=True):
            weight.data = original
        switch(layers, True)


def switch(layers: Iterable[BaseTunerLayer], on: bool) -> None:
    """Switches LoRA layers on or off; PEFT's enable_adapters also sets what is trained, and takes 20 times as long."""
    for layer in layers:
        layer._disable_adapters = not on


def can_be_merged(layer: nn.Module) -> bool:
    """Whether `layer` is PEFT's linear layer with one active LoRA, without bias or variant such as DoRA."""
    if type(layer) not in (Linear, LeanLora) or type(layer.get_base_layer()) is not nn.Linear:
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name in layer.lora_B and layer.lora_B[name].bias is None and name not in layer.lora_variant
