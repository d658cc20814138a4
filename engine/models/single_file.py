"""Loads the parts of one .safetensors checkpoint in the key format of the original Stable Diffusion code.

diffusers converts the keys. Each part reads only its own tensors, so the file is read once in total. What a checkpoint
does not hold (configurations, tokenizers, the noise schedule) comes from a folder in diffusers format.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError, one_line
from .families.find import holds
from .families.shared import VAE_PREFIX
from .model_files import read_shapes
from .weight_files import check_finite


def prediction_of(file: Path, key: str) -> dict:
    """Returns the scheduler options that a checkpoint's marker tensors ask for: some v-prediction models carry them."""
    marks = read_shapes(file, key).keys() & {"v_pred", "ztsnr"}
    options = {"prediction_type": "v_prediction"} if "v_pred" in marks else {}
    return options | ({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})


def load_from_file(
    kind: type, file: Path, prefix: str, configured: Path, dtype: torch.dtype, key: str
) -> torch.nn.Module:
    """Loads a network of class `kind` from the tensors under `prefix`, configured as in the folder `configured`.

    An empty prefix takes all tensors, which may then also be in diffusers' own key format. Raises UserError if a
    tensor is missing or not finite, or the tensors are of another architecture.
    """
    folder, part = configured.parent, configured.name
    options = {"config": str(folder), "subfolder": part, "torch_dtype": dtype, "local_files_only": True}
    incomplete = UserError(f"{key}: {file} lacks tensors of the {part} that is configured in {folder}")
    try:
        state = _tensors(file, prefix)
        if part.startswith("text_encoder"):
            model = create_diffusers_clip_model_from_ldm(kind, checkpoint=state, **options)
        else:
            model = kind.from_single_file(state, **options)
    except NotImplementedError:  # raised when a tensor without data is moved
        raise incomplete from None
    except Exception as error:  # diffusers raises many kinds for what it does not know
        raise UserError(f"{key}: {file} holds no {part} of the architecture in {folder} ({one_line(error)})") from None
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise incomplete
    check_finite(model.state_dict(), f"{key}: {file}")
    return model


def vae_of_file(file: Path, folder: Path, dtype: torch.dtype, key: str) -> AutoencoderKL:
    """Loads the VAE of a .safetensors file, a VAE alone or a whole checkpoint, configured as in folder/vae."""
    is_checkpoint = holds(read_shapes(file, key), VAE_PREFIX)
    return load_from_file(AutoencoderKL, file, VAE_PREFIX if is_checkpoint else "", folder / "vae", dtype, key)


def _tensors(file: Path, prefix: str) -> dict[str, Tensor]:
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
