"""One .safetensors checkpoint in the key format of the original code: each of its parts as a network.

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
from .families.find import holds
from .families.shared import VAE_PREFIX
from .model_files import read_shapes

BROKEN = (OSError, ValueError, RuntimeError, LookupError, AttributeError)  # what a conversion stumbles over


def prediction_of(file: Path, key: str) -> dict:
    """What a checkpoint itself says of its training, as scheduler options: some v-prediction models are marked so."""
    marks = read_shapes(file, key).keys() & {"v_pred", "ztsnr"}
    said = {"prediction_type": "v_prediction"} if "v_pred" in marks else {}
    return said | ({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})


def load_from_file(
    kind: type, file: Path, prefix: str, configured: Path, dtype: torch.dtype, key: str
) -> torch.nn.Module:
    """A network `kind` of the tensors under `prefix`, configured as in the folder of a model's part.

    Raises UserError where a tensor is lacking. An empty prefix takes all tensors, which may then be
    in diffusers' own key format too.
    """
    folder, part = configured.parent, configured.name
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
    whole = holds(read_shapes(file, key), VAE_PREFIX)
    return load_from_file(AutoencoderKL, file, VAE_PREFIX if whole else "", folder / "vae", dtype, key)


def _tensors(file: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
