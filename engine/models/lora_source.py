"""Finds the LoRA that a path means and the base model that it was trained on, and adds it to a UNet's weights.

lora_file.py reads the file; nothing is trained or written here.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from ..config.find import config_of_json, load
from ..config.training import Config, ModelConfig
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
    if not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, expected a run, a checkpoint or a LoRA")
    checkpoint = newest(path)
    files = [path / LORA_FILE, path / "lora" / LORA_FILE, *([checkpoint / LORA_FILE] if checkpoint else [])]
    others = (file for file in path.glob("*.safetensors") if file.is_file())
    candidates = [file for file in files if file.is_file()] or list(others)
    if not candidates:
        raise UserError(f"{path}: found no LoRA and no finished checkpoint, expected {files[0]} or {files[1]}")
    if candidates[0] not in files and len(candidates) > 1:
        raise UserError(f"{path}: found {len(candidates)} .safetensors files, expected one LoRA; name the file")
    loras = [(file, read(file)) for file in candidates]
    return max(loras, key=lambda pair: _iteration(pair[1]))


def recipe_of(lora: Lora, source: Path) -> Config | None:
    """Returns the recipe of the run that a LoRA file lies in, else that of its header, whose paths are names alone.

    Of a header no `module:factory` is taken, for a file that somebody publishes must not say which code runs here.
    None where there is neither, or that of another version.
    """
    if "strop.config" not in lora.facts:
        return None
    for folder in (source.parent, source.parent.parent):  # of a checkpoint, and of RUN/lora
        with contextlib.suppress(UserError):
            if (folder / "config.yaml").is_file():
                return load(folder / "config.yaml")
    try:
        recipe = config_of_json(lora.facts["strop.config"])
    except ValueError:
        return None
    scorers = tuple(spec for spec in recipe.evaluate.scorers if ":" not in spec)
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"scorers": scorers})})


def base_of(lora: Lora, source: Path, base: str | None, components: str | None) -> ModelConfig:
    """Returns the model `base`, or that on which the LoRA was trained. Raises UserError if neither is known."""
    if base is not None:
        return ModelConfig(path=base, components=components)
    recipe = recipe_of(lora, source)
    if recipe is None:
        raise UserError(f"{source} does not say which model it was trained on; name it with --base")
    model = recipe.model
    return ModelConfig(path=model.path, revision=model.revision, components=components or model.components)


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


def _iteration(lora: Lora) -> int:
    """Returns the iteration that a header tells; 0 where it tells none."""
    text = lora.facts.get("strop.iteration", "")
    return int(text) if text.isdecimal() and len(text) < 18 else 0
