"""Which family a base model is of, judged by its configuration files or the names of its tensors; no weights are read.

The name of a model says nothing: a fine-tune is known by its architecture, and so is whatever strop does not train,
which is refused in one sentence that says what was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import UserError
from ..model_files import read_config, read_index, read_json, read_shapes
from .base import Family
from .sd15 import SD15
from .sdxl import SDXL
from .shared import CHANNELS, UNET_PREFIX

FAMILIES: tuple[Family, ...] = (SD15, SDXL)  # the first is taken where nothing tells
EXPECTED = f"expected {', '.join(family.title for family in FAMILIES)} or a fine-tune of either"
TRAIN_TIMESTEPS = 1000
EDM = {"edm_mean", "edm_vpred.sigma_max"}
SIGNS = {  # what else a file may be, by a piece of one of its keys
    "lora": "a LoRA",
    ".joint_blocks.": "an SD3",
    "double_blocks.": "a Flux",
    "down_blocks.0.resnets.": "a part of a model in diffusers format",
    "decoder.mid.": "a VAE alone",
}


def family_named(name: str) -> Family:
    """The family whose `name` it is. Raises UserError that lists them all."""
    known = {family.name: family for family in FAMILIES}
    if name not in known:
        raise UserError(f"family: found {name!r}, expected one of {', '.join(known)}")
    return known[name]


def family_guessed(path: str) -> Family:
    """The family of which the name of a model tells that is not on this machine."""
    told = (family for family in FAMILIES if any(sign in path.lower() for sign in family.name_signs))
    return next(told, FAMILIES[0])


def family_of_unet(unet: Mapping) -> Family:
    """The family of a UNet with this configuration, of a model that `family_of_folder` takes."""
    return next(family for family in FAMILIES if family.takes(unet))


def family_of_folder(folder: Path, key: str) -> Family:
    """The family of a folder in diffusers format. key: where it stands in the recipe.

    Raises UserError for anything else, saying what it is.
    """
    found = _without_unet(folder, key)
    if found is None:
        unet = read_config(folder, "unet", key)
        found = _unlike_unet(unet)
    if found is None:
        family = family_of_unet(unet)
        found = _unlike_family(family, folder, unet, key) or _unlike_schedule(read_config(folder, "scheduler", key))
    if found:
        raise UserError(f"{key}: {folder} is {found}; {EXPECTED}")
    return family


def family_of_file(file: Path, key: str, own_vae: bool) -> Family:
    """The family of a whole checkpoint in the key format of the original code. own_vae: it must hold a VAE.

    Raises UserError for anything else, saying what it is.
    """
    shapes = read_shapes(file, key)
    held = {family: [part for part, prefix in family.prefixes.items() if holds(shapes, prefix)] for family in FAMILIES}
    family = max(FAMILIES, key=lambda each: len(held[each]))
    lacking = [part for part in family.prefixes if part not in held[family] and (own_vae or part != "vae")]
    found = _unlike_checkpoint(shapes) or (f"a checkpoint without {' and '.join(lacking)}" if lacking else None)
    if found:
        raise UserError(f"{key}: {file} is {found}; {EXPECTED}, with UNet, VAE and text encoders in one file")
    return family


def holds(shapes: Mapping[str, list[int]], prefix: str) -> bool:
    """Whether the name of one of a file's tensors begins so."""
    return any(name.startswith(prefix) for name in shapes)


def _without_unet(folder: Path, key: str) -> str | None:
    """What a folder without a UNet is; None where it has one."""
    if (folder / "unet").is_dir():
        return None
    own = read_json(folder / "config.json", key) if (folder / "config.json").is_file() else {}
    name = read_index(folder, key).get("_class_name") or own.get("_class_name") or own.get("model_type")
    if name or (folder / "transformer").is_dir():
        return f"a {name or 'diffusion transformer'}, with no folder unet/"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if files:
        return f"a folder without unet/ (for the checkpoint in it, write {folder / files[0]})"
    return "a folder without unet/, so no model in diffusers format"


def _unlike_unet(unet: dict) -> str | None:
    """What a UNet is that no family has; None where it may be one of theirs."""
    name = unet.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        return f"a model around a {name}"
    if found := _unlike_channels(unet.get("in_channels", 4)):
        return found
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


def _unlike_channels(channels: int) -> str | None:
    """What a UNet of so many input channels is, None for those of a latent."""
    if channels == CHANNELS:
        return None
    return f"a model with {channels} input channels{', made for inpainting' if channels == 9 else ''}"


def _unlike_family(family: Family, folder: Path, unet: dict, key: str) -> str | None:
    """What a model is whose UNet has the inputs of a family, but which is none of it; None where it is one."""
    if found := family.lookalike(unet, [part for part in family.text_encoders if (folder / part).is_dir()]):
        return found
    return family.unlike_text(unet, {part: read_config(folder, part, key) for part in family.text_encoders})


def _unlike_schedule(scheduler: dict) -> str | None:
    """What a model is that was not trained on 1000 steps to predict eps or v, None where it was."""
    if "beta_start" not in scheduler and not scheduler.get("trained_betas"):
        return f"a model trained on another kind of noise ({scheduler.get('_class_name')}, without betas)"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return f"a model with prediction_type {prediction!r}, where strop takes epsilon and v_prediction"
    steps = scheduler.get("num_train_timesteps", TRAIN_TIMESTEPS)
    return f"a model trained on {steps} timesteps" if steps != TRAIN_TIMESTEPS else None


def _unlike_checkpoint(shapes: dict[str, list[int]]) -> str | None:
    """What a file of these tensors is that is no checkpoint of any family, None where it may be one."""
    first = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is None:
        return next((what for sign, what in SIGNS.items() if any(sign in name for name in shapes)), "no checkpoint")
    if found := _unlike_channels(first[1]):
        return found
    lookalikes = {prefix: what for family in FAMILIES for prefix, what in family.lookalikes.items()}
    if found := next((what for prefix, what in lookalikes.items() if holds(shapes, prefix)), None):
        return found
    return "a model trained on another kind of noise (EDM)" if shapes.keys() & EDM else None
