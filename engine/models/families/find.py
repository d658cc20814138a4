"""Finds the family of a base model by its configuration files or its tensors' names; no weights are read.

A model's name decides nothing: fine-tunes are recognised by their architecture. A model that strop does not train is
refused in one sentence that says which kind of model was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError, short
from ..model_files import read_config, read_index, read_json, read_shapes
from .base import Family
from .sd15 import SD15
from .sdxl import SDXL
from .shared import CHANNELS, UNET_PREFIX

FAMILIES: tuple[Family, ...] = (SD15, SDXL)  # the first is the default
EXPECTED = f"expected {', '.join(family.title for family in FAMILIES)} or a fine-tune of either"
TRAIN_TIMESTEPS = 1000
EDM = {"edm_mean", "edm_vpred.sigma_max"}
OTHER_FILES = {  # kinds of other files, by a substring of one of their tensor names
    "lora": "a LoRA",
    ".joint_blocks.": "an SD3",
    "double_blocks.": "a Flux",
    "down_blocks.0.resnets.": "a part of a model in diffusers format",
    "decoder.mid.": "a VAE alone",
}


def family_named(name: str) -> Family:
    """Returns the family with this name. Raises UserError that lists all names."""
    by_name = {family.name: family for family in FAMILIES}
    if name not in by_name:
        raise UserError(f"family: found {name!r}, expected one of {', '.join(by_name)}")
    return by_name[name]


def family_guessed(path: str) -> Family:
    """Returns the family that the name of a model hints at; for models that are not on this machine."""
    candidates = (family for family in FAMILIES if any(sign in path.lower() for sign in family.name_signs))
    return next(candidates, FAMILIES[0])


def family_of_unet(unet: Mapping) -> Family:
    """Returns the family of a UNet with this configuration, of a model that `family_of_folder` accepts."""
    return next(family for family in FAMILIES if family.takes(unet))


def family_of_folder(folder: Path, key: str) -> Family:
    """Returns the family of a folder in diffusers format. key: the configuration key that names it.

    Raises UserError for anything else and says what it is.
    """
    other_kind = _kind_without_unet(folder, key)
    if other_kind is None:
        unet = read_config(folder, "unet", key)
        other_kind = _other_unet(unet)
    if other_kind is None:
        family, scheduler = family_of_unet(unet), read_config(folder, "scheduler", key)
        other_kind = _other_family(family, folder, unet, key) or _other_schedule(scheduler)
    if other_kind:
        raise UserError(f"{key}: {folder} is {other_kind}; {EXPECTED}")
    return family


def family_of_file(file: Path, key: str, own_vae: bool) -> Family:
    """Returns the family of a whole checkpoint in the original code's key format. own_vae: it must hold a VAE.

    Raises UserError for anything else and says what it is.
    """
    shapes = read_shapes(file, key)
    parts = {family: [part for part, prefix in family.prefixes.items() if holds(shapes, prefix)] for family in FAMILIES}
    family = max(FAMILIES, key=lambda candidate: len(parts[candidate]))
    missing = [part for part in family.prefixes if part not in parts[family] and (own_vae or part != "vae")]
    other_kind = _other_checkpoint(shapes) or (f"a checkpoint without {' and '.join(missing)}" if missing else None)
    if other_kind:
        raise UserError(f"{key}: {file} is {other_kind}; {EXPECTED}, with UNet, VAE and text encoders in one file")
    return family


def holds(shapes: Mapping[str, list[int]], prefix: str) -> bool:
    """Whether the name of one of a file's tensors begins with `prefix`."""
    return any(name.startswith(prefix) for name in shapes)


def _kind_without_unet(folder: Path, key: str) -> str | None:
    """Describes a folder without a UNet; None if it has one."""
    if (folder / "unet").is_dir():
        return None
    config = read_json(folder / "config.json", key) if (folder / "config.json").is_file() else {}
    name = read_index(folder, key).get("_class_name") or config.get("_class_name") or config.get("model_type")
    if name or (folder / "transformer").is_dir():
        return f"a {name or 'diffusion transformer'}, with no folder unet/"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if files:
        return f"a folder without unet/ (for the checkpoint in it, write {folder / files[0]})"
    return "a folder without unet/, so no model in diffusers format"


def _other_unet(unet: dict) -> str | None:
    """Describes a UNet that no family has; None if a family may have it."""
    name = unet.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        return f"a model around a {name}"
    if not isinstance(widths := unet.get("block_out_channels", []), list):
        return f"a model with block_out_channels {short(widths)} in its UNet"
    if other_kind := _other_channels(unet.get("in_channels", 4)):
        return other_kind
    if unet.get("out_channels", 4) != CHANNELS:
        return f"a model with {unet['out_channels']} output channels"
    if unet.get("time_cond_proj_dim"):
        return "a model distilled to take the guidance scale as an input (time_cond_proj_dim)"
    for option in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if unet.get(option) is not None:
            return f"a model with {option} {unet[option]!r} in its UNet"
    if unet.get("attention_type", "default") != "default":
        return f"a model with attention_type {unet['attention_type']!r} in its UNet"
    if not any(family.takes(unet) for family in FAMILIES):
        return f"a model with addition_embed_type {unet.get('addition_embed_type')!r} in its UNet"
    return None


def _other_channels(channels: int) -> str | None:
    """Describes a UNet by its number of input channels; None if it is that of a latent."""
    if channels == CHANNELS:
        return None
    return f"a model with {channels} input channels{', made for inpainting' if channels == 9 else ''}"


def _other_family(family: Family, folder: Path, unet: dict, key: str) -> str | None:
    """Describes a model whose UNet has the inputs of a family it does not belong to; None if it belongs to it."""
    if other_kind := family.lookalike(unet, [part for part in family.text_encoders if (folder / part).is_dir()]):
        return other_kind
    return family.unlike_text(unet, {part: read_config(folder, part, key) for part in family.text_encoders})


def _other_schedule(scheduler: dict) -> str | None:
    """Describes a model that was not trained on 1000 timesteps to predict eps or v; None if it was."""
    if "beta_start" not in scheduler and not scheduler.get("trained_betas"):
        return f"a model trained on another kind of noise ({scheduler.get('_class_name')}, without betas)"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return f"a model with prediction_type {prediction!r}, where strop takes epsilon and v_prediction"
    steps = scheduler.get("num_train_timesteps", TRAIN_TIMESTEPS)
    return f"a model trained on {steps} timesteps" if steps != TRAIN_TIMESTEPS else None


def _other_checkpoint(shapes: dict[str, list[int]]) -> str | None:
    """Describes a file of these tensors that is no checkpoint of any family; None if it may be one."""
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is None:
        return next(
            (kind for sign, kind in OTHER_FILES.items() if any(sign in name for name in shapes)), "no checkpoint"
        )
    if other_kind := _other_channels(first[1]):
        return other_kind
    lookalikes = {prefix: kind for family in FAMILIES for prefix, kind in family.lookalikes.items()}
    if other_kind := next((kind for prefix, kind in lookalikes.items() if holds(shapes, prefix)), None):
        return other_kind
    return "a model trained on another kind of noise (EDM)" if shapes.keys() & EDM else None
