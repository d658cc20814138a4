"""Finds the LoRA that a path means and the base model that it was trained on, and adds it to a UNet's weights.

lora_file.py reads the file; nothing is trained or written here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ..config.training import ModelConfig
from ..errors import UserError
from ..runtime.checkpoint import newest
from .lora_file import LORA_FILE, Lora, read


def find_lora(path: Path) -> tuple[Path, Lora]:
    """Finds the LoRA file that a path means, and reads it. Raises UserError if there is none.

    In a run folder it is the later of lora/ and the newest checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path}: found no such file or folder, expected a run, a checkpoint or a LoRA")
    if path.is_file():
        return path, read(path)
    checkpoint = newest(path)
    files = [path / LORA_FILE, path / "lora" / LORA_FILE, *([checkpoint / LORA_FILE] if checkpoint else [])]
    candidates = [file for file in files if file.is_file()] or list(path.glob("*.safetensors"))
    if not candidates:
        raise UserError(f"{path}: found no LoRA and no finished checkpoint, expected {files[0]} or {files[1]}")
    if candidates[0] not in files and len(candidates) > 1:
        raise UserError(f"{path}: found {len(candidates)} .safetensors files, expected one LoRA; name the file")
    loras = [(file, read(file)) for file in candidates]
    return max(loras, key=lambda pair: int(pair[1].facts.get("strop.iteration", 0)))


def base_of(lora: Lora, source: Path, base: str | None, components: str | None) -> ModelConfig:
    """Returns the model `base`, or that on which the LoRA was trained. Raises UserError if neither is known."""
    if base is None and "strop.config" not in lora.facts:
        raise UserError(f"{source} does not say which model it was trained on; name it with --base")
    trained_on = json.loads(lora.facts.get("strop.config", "{}")).get("model", {})
    if base is not None:
        trained_on = {"path": base}
    if components is not None:
        trained_on["components"] = components
    return ModelConfig(**{key: trained_on.get(key) for key in ("path", "revision", "components")})


@torch.no_grad()
def add_lora(unet: nn.Module, lora: Lora, source: Path, base: str, strength: float = 1.0) -> None:
    """Adds strength * alpha / rank * up @ down to a UNet's weights in place, in float32 rounded once to their type.

    source, base and errors: as of check_lora.
    """
    check_lora(unet, lora, source, base)
    for name, weight in unet.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in lora.up:
            weight.copy_(weight.float() + strength * lora.delta(layer).to(weight.device))


def check_lora(unet: nn.Module, lora: Lora, source: Path, base: str) -> None:
    """Raises UserError if a layer of the LoRA is not in a UNet, which may be one without weights, or does not fit it.

    source: the LoRA's file, base: the UNet's model, both for the message.
    """
    weights = {name.removesuffix(".weight"): value.shape for name, value in unet.named_parameters()}
    shapes = {layer: (len(up), *lora.down[layer].shape[1:]) for layer, up in lora.up.items()}
    misfits = [layer for layer, shape in shapes.items() if weights.get(layer) != shape]
    if misfits:
        raise UserError(
            f"{source} ({lora.facts.get('strop.family', 'of unknown family')}) does not fit the UNet of {base}: "
            f"{len(misfits)} of its {len(shapes)} layers are not there or have another shape, such as {misfits[0]}; "
            "name a model of the LoRA's own family with --base"
        )
