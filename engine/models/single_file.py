"""One .safetensors checkpoint in the key format of the original code: what it is, and each of its parts as a network.

The conversion of keys is diffusers'. A part reads its own tensors only, so that the file is read once in all. What a
checkpoint does not hold (configurations, tokenizers, the noise schedule) comes from a folder in diffusers format.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .family import EXPECTED, unlike_channels

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {
    "sd15": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model."},
    "sdxl": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
}
BROKEN = (OSError, ValueError, RuntimeError, LookupError, AttributeError)  # what a conversion stumbles over
EDM = {"edm_mean", "edm_vpred.sigma_max"}
SIGNS = {  # what else a file may be, by a piece of one of its keys
    "lora": "a LoRA",
    ".joint_blocks.": "an SD3",
    "double_blocks.": "a Flux",
    "down_blocks.0.resnets.": "a part of a model in diffusers format",
    "decoder.mid.": "a VAE alone",
}


def shapes(file: Path, key: str) -> dict[str, list[int]]:
    """The shape of every tensor of a .safetensors file, from its header. Raises UserError where it is none."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {file} is no .safetensors file ({error})") from None


def family_of_file(file: Path, key: str, own_vae: bool) -> str:
    """`sd15` or `sdxl`, of a whole checkpoint. own_vae: it must hold a VAE.

    Raises UserError for anything else, saying what it is.
    """
    found = shapes(file, key)
    family = "sdxl" if _holds(found, "conditioner.") else "sd15"
    wanted = [part for part in PREFIXES[family] if own_vae or part != "vae"]
    lacking = [part for part in wanted if not _holds(found, PREFIXES[family][part])]
    odd = _unlike_checkpoint(found) or (f"a checkpoint without {' and '.join(lacking)}" if lacking else None)
    if odd:
        raise UserError(f"{key}: {file} is {odd}; {EXPECTED}, with UNet, VAE and text encoders in one file")
    return family


def prediction_of(file: Path, key: str) -> dict:
    """What a checkpoint itself says of its training, as scheduler options: some v-prediction models are marked so."""
    marks = shapes(file, key).keys() & {"v_pred", "ztsnr"}
    said = {"prediction_type": "v_prediction"} if "v_pred" in marks else {}
    return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})


def load_from_file(
    kind: type, file: Path, prefix: str, folder: Path, part: str, dtype: torch.dtype, key: str
) -> torch.nn.Module:
    """A network `kind` of the tensors under `prefix`, configured as folder/part. Raises UserError where one is lacking.

    An empty prefix takes all tensors, which may then be in diffusers' own key format too.
    """
    options = {"config": str(folder), "subfolder": part, "torch_dtype": dtype, "local_files_only": True}
    lacking = UserError(f"{key}: {file} lacks tensors of the {part} that is configured in {folder}")
    try:
        state = _tensors(file, prefix)
        if part.startswith("text_encoder"):
            model = create_diffusers_clip_model_from_ldm(kind, checkpoint=state, **options)
        else:
            model = kind.from_single_file(state, **options)
    except NotImplementedError:  # of moving a tensor that got no data
        raise lacking from None
    except (*BROKEN, SingleFileComponentError, SafetensorError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{key}: {file} holds no {part} of the architecture in {folder} ({found})") from None
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise lacking
    return model


def vae_of_file(file: Path, folder: Path, dtype: torch.dtype, key: str) -> AutoencoderKL:
    """The VAE of a .safetensors file that holds a VAE alone or a whole checkpoint, configured as folder/vae."""
    whole = _holds(shapes(file, key), VAE)
    return load_from_file(AutoencoderKL, file, VAE if whole else "", folder, "vae", dtype, key)


def _unlike_checkpoint(found: dict[str, list[int]]) -> str | None:
    """What a file of these tensors is that is no checkpoint of the two families, None for one of theirs."""
    first = found.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        return next((what for sign, what in SIGNS.items() if any(sign in name for name in found)), "no checkpoint")
    if odd := unlike_channels(first[1]):
        return odd
    if _holds(found, "conditioner.embedders.0.model."):
        return "an SDXL refiner"
    if _holds(found, "cond_stage_model.model."):
        return "a Stable Diffusion 2"
    return "a model trained on another kind of noise (EDM)" if found.keys() & EDM else None


def _holds(found: dict[str, list[int]], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in found)


def _tensors(file: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
