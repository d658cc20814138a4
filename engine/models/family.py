"""Which family a base model is of, SD-1.5 or SDXL, judged by its configuration files; no weights are read here.

Names say nothing: a fine-tune is known by its architecture, and so is whatever strop does not train, which is refused
in one sentence that says what was found.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError

TEXT_ENCODERS = {"sd15": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
EXPECTED = "expected Stable Diffusion 1.5, SDXL or a fine-tune of either"
CHANNELS = 4  # of a latent
TIME_IDS = 6  # original size, crop, target size
TRAIN_TIMESTEPS = 1000


def read_config(folder: Path, part: str, key: str) -> dict:
    """The JSON configuration of one part of a model folder. key: where the folder stands in the recipe.

    Raises UserError where there is none.
    """
    if not (folder / part).is_dir():
        raise UserError(f"{key}: {folder} has no folder {part}/, which every model in diffusers format has")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not file.is_file():
        raise UserError(f"{key}: {folder / part} has no {file.name}")
    return _read(file, key)


def read_index(folder: Path, key: str) -> dict:
    """model_index.json of a model folder; empty where it has none. Raises UserError where it is no JSON."""
    file = folder / "model_index.json"
    return _read(file, key) if file.is_file() else {}


def family_of(folder: Path, key: str) -> str:
    """`sd15` or `sdxl`, of a folder in diffusers format. Raises UserError for anything else, saying what it is."""
    found = _unlike_folder(folder, key)
    if found is None:
        unet = read_config(folder, "unet", key)
        family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd15"
        scheduler = read_config(folder, "scheduler", key)
        found = _unlike_unet(unet) or _unlike_text(folder, family, unet, key) or _unlike_schedule(scheduler)
    if found:
        raise UserError(f"{key}: {folder} is {found}; {EXPECTED}")
    return family


def unlike_channels(channels: int) -> str | None:
    """What a UNet of so many input channels is, None for those of a latent."""
    if channels == CHANNELS:
        return None
    return f"a model with {channels} input channels{', made for inpainting' if channels == 9 else ''}"


def _read(file: Path, key: str) -> dict:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no JSON object")
    return config


def _unlike_folder(folder: Path, key: str) -> str | None:
    """What a folder without a UNet is; None where it has one."""
    if (folder / "unet").is_dir():
        return None
    own = _read(folder / "config.json", key) if (folder / "config.json").is_file() else {}
    name = read_index(folder, key).get("_class_name") or own.get("_class_name") or own.get("model_type")
    if name or (folder / "transformer").is_dir():
        return f"a {name or 'diffusion transformer'}, with no folder unet/"
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if files:
        return f"a folder without unet/ (for the checkpoint in it, write {folder / files[0]})"
    return "a folder without unet/, so no model in diffusers format"


def _unlike_unet(unet: dict) -> str | None:
    """What a UNet is that neither family has; None where it is one of theirs."""
    name = unet.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        return f"a model around a {name}"
    if found := unlike_channels(unet.get("in_channels", 4)):
        return found
    if unet.get("out_channels", 4) != CHANNELS:
        return f"a model with {unet['out_channels']} output channels"
    if unet.get("time_cond_proj_dim"):
        return "a model distilled to take the guidance scale as an input (time_cond_proj_dim)"
    for option in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if unet.get(option) is not None:
            return f"a model with {option} {unet[option]!r} in its UNet"
    if unet.get("addition_embed_type") not in (None, "text_time"):
        return f"a model with addition_embed_type {unet['addition_embed_type']!r} in its UNet"
    return None


def _unlike_text(folder: Path, family: str, unet: dict, key: str) -> str | None:
    """What a model is whose text encoders are not those that its UNet asks for, None where they are."""
    if family == "sdxl" and not (folder / "text_encoder").is_dir() and (folder / "text_encoder_2").is_dir():
        return "an SDXL refiner (it has no text_encoder/)"
    configs = [read_config(folder, part, key) for part in TEXT_ENCODERS[family]]
    kinds = [config.get("model_type") for config in configs]
    if set(kinds) != {"clip_text_model"}:
        return f"a model with text encoders of type {', '.join(map(str, kinds))}"
    defaults = 512  # of transformers, which writes down only what differs from them
    widths = [config.get("hidden_size", defaults) for config in configs]
    if sum(widths) != unet.get("cross_attention_dim"):
        return f"a model whose UNet takes text {unet.get('cross_attention_dim')} wide from encoders of {widths}"
    if family == "sdxl":
        sizes = TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != sizes + configs[1].get("projection_dim", defaults):
            return f"a model whose UNet does not take {TIME_IDS} sizes beside the pooled text, as SDXL's does"
    return None


def _unlike_schedule(scheduler: dict) -> str | None:
    """What a model is that was not trained on 1000 steps to predict eps or v, None where it was."""
    if "beta_start" not in scheduler and not scheduler.get("trained_betas"):
        return f"a model trained on another kind of noise ({scheduler.get('_class_name')}, without betas)"
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        return f"a model with prediction_type {prediction!r}, where strop takes epsilon and v_prediction"
    steps = scheduler.get("num_train_timesteps", TRAIN_TIMESTEPS)
    return f"a model trained on {steps} timesteps" if steps != TRAIN_TIMESTEPS else None
