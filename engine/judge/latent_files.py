"""Reads and writes a latent judge's folder: unet/, a folder for each text encoder, and its projections.

Ours lie in judge.safetensors, with the conventions of scoring in judge.json; those of LPO's released folders in
state_dict.pt. The UNet may have its decoder, which is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..config.training import JudgeConfig
from ..errors import UserError
from ..models.base_model import KINDS, load_network, network_kind
from ..models.families.find import family_of_unet
from ..models.hub import fetch
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_files import read_config, read_json
from ..models.weight_files import check_finite, check_fit, fill, read_tensors, save_tensors
from .files import RECORD
from .latent import DECODER, LatentJudge, LatentNetwork, without_decoder

PROJECTIONS, PUBLISHED = "judge.safetensors", "state_dict.pt"
PUBLISHED_GUIDANCE = 7.5
VISUAL, TEXT, SCALE = "visual_projection.weight", "text_projection.weight", "logit_scale"


def load(judge: JudgeConfig, diffusion: LatentDiffusion, dtype: torch.dtype) -> LatentJudge:
    """Loads a latent judge, frozen, its projections in float32. Raises UserError that names what does not fit."""
    folder = fetch(judge.path, judge.revision, "judge.path", (RECORD, PROJECTIONS, PUBLISHED, "unet/*"))
    if not folder.is_dir():
        raise UserError(f"judge.path: found the file {folder}, expected the folder of a latent judge")
    family, tensors, record = diffusion.family, _projections(folder), _record(folder)
    unet = _unet(folder, diffusion).to(dtype)
    encoders = [
        load_network(network_kind(family, part), judge.path, judge.revision, part, dtype, "judge.path")
        for part in family.text_encoders
    ]
    built = LatentNetwork(unet, encoders, tensors[VISUAL], tensors.get(TEXT), tensors[SCALE]).to(diffusion.device)
    _check_widths(built, tensors, encoders[-1].config, folder)
    guidance = record["guidance"] if judge.guidance is None else judge.guidance
    return LatentJudge(built, diffusion, guidance, record["t_of_step"])


def save(folder: Path, judge: LatentJudge) -> None:
    """Writes a folder that `load` reads."""
    network = judge.network
    network.unet.save_pretrained(folder / "unet")
    for part, encoder in zip(judge.family.text_encoders, network.encoders, strict=True):
        encoder.save_pretrained(folder / part)
    tensors = {VISUAL: network.visual_projection, TEXT: network.text_projection, SCALE: network.logit_scale}
    save_tensors({name: value.detach() for name, value in tensors.items() if value is not None}, folder / PROJECTIONS)
    record = {"kind": judge.kind, "guidance": judge.guidance, "t_of_step": judge.t_of_step}
    (folder / RECORD).write_text(json.dumps(record))


def _projections(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors beside the networks by name, in float32."""
    if (folder / PROJECTIONS).is_file():
        tensors = read_tensors(folder / PROJECTIONS, "judge.path")
    elif (folder / PUBLISHED).is_file():
        tensors = _flat(_published(folder / PUBLISHED))
    else:
        raise UserError(
            f"judge.path: {folder} has neither {PROJECTIONS} nor {PUBLISHED}, expected the folder of a latent judge; "
            "other judges have another judge.kind"
        )
    if missing := {VISUAL, SCALE} - tensors.keys():
        raise UserError(f"judge.path: {folder} has no {min(missing)}, expected {VISUAL} and {SCALE}")
    check_finite(tensors, f"judge.path: {folder}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _published(file: Path) -> Mapping:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # broken pickles raise many kinds
        raise UserError(f"judge.path: {file} is broken, or more than tensors and may run code") from None


def _flat(state: object) -> dict[str, Tensor]:
    """Returns tensors of a nested dictionary by dotted name."""
    if not isinstance(state, Mapping):
        return {}
    flat = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            flat[str(name)] = value
        else:
            flat |= {f"{name}.{rest}": tensor for rest, tensor in _flat(value).items()}
    return flat


def _record(folder: Path) -> dict:
    """Returns the conventions of scoring: those that `save` wrote, without a record the published ones."""
    file = folder / RECORD
    if not file.is_file():
        return {"guidance": PUBLISHED_GUIDANCE, "t_of_step": True}
    record = read_json(file, "judge.path")
    if record.get("kind") != LatentJudge.kind:
        raise UserError(f"judge.kind: found latent, but {file} names the kind {record.get('kind')!r}")
    if not isinstance(record.get("guidance"), (int, float)) or not isinstance(record.get("t_of_step"), bool):
        raise UserError(f"judge.path: {file} lacks the number guidance or the truth value t_of_step")
    return record


def _unet(folder: Path, diffusion: LatentDiffusion) -> UNet2DConditionModel:
    """Loads the UNet's encoder. Raises UserError where it is broken, or reads latents of another base model."""
    config = read_config(folder, "unet", "judge.path")
    family, channels = family_of_unet(config), config["in_channels"]
    if family.name != diffusion.family.name:
        raise UserError(
            f"judge.path: {folder} reads latents of {family.title}, but model.path is {diffusion.family.title}"
        )
    if channels != diffusion.latent_shape[0]:
        raise UserError(
            f"judge.path: {folder} reads latents of {channels} channels, but model.path has {diffusion.latent_shape[0]}"
        )
    with torch.device("meta"):
        unet = without_decoder(KINDS["unet"].from_config(config))
    files = sorted((folder / "unet").glob("*.safetensors"))
    tensors = {name: each for file in files for name, each in read_tensors(file, "judge.path").items()}
    state = {name: each for name, each in tensors.items() if name.split(".")[0] not in DECODER}
    check_fit(unet, state, (), f"judge.path: the tensors in {folder / 'unet'} do not fit its config.json")
    fill(unet, state, (), f"judge.path: {folder / 'unet'}")
    return unet


def _check_widths(network: LatentNetwork, tensors: Mapping[str, Tensor], text: object, folder: Path) -> None:
    """Raises UserError where a projection does not fit its network. text: the last encoder's configuration."""
    blocks = network.unet.config.block_out_channels
    visual, scale = tensors[VISUAL], tensors[SCALE]
    fits = visual.ndim == 2 and visual.shape[1] in (blocks[-1], sum(blocks) + blocks[-1]) and scale.numel() == 1
    projected = TEXT in tensors
    shape = tensors[TEXT].shape if projected else (text.projection_dim, text.projection_dim)
    fits = fits and tuple(shape) == (len(visual), text.hidden_size if projected else len(visual))
    if not fits:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UserError(
            f"judge.path: the projections in {folder} ({found}) do not fit its networks, whose UNet has features of "
            f"{sum(blocks) + blocks[-1]} numbers, {blocks[-1]} of them in the middle"
        )
