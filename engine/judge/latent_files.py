"""Reads and writes a latent judge's folder: unet/, a folder for each text encoder, and its projections.

Ours lie in judge.safetensors, with the conventions of scoring in judge.json; those of LPO's released folders in
state_dict.pt. The UNet may have its decoder, which is dropped. A judge that is a LoRA has it in judge.safetensors and
no further folders: its networks are the base model's. `begin` makes the judge with which a training begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..config.judge_training import TrainedJudgeConfig
from ..config.training import JudgeConfig, ModelConfig
from ..errors import UserError
from ..models.adapter import lora_state, set_lora_state
from ..models.base_model import DTYPES, KINDS, BaseModel, configure_unet, load_network, network_kind
from ..models.families.find import family_of_unet
from ..models.hub import fetch
from ..models.latent_diffusion import LatentDiffusion
from ..models.model_files import read_config, read_json
from ..models.weight_files import check_finite, check_fit, fill, read_tensors, read_weights, save_tensors
from .files import RECORD
from .latent import DECODER, LatentJudge, LatentNetwork, feature_width, without_decoder

PROJECTIONS, PUBLISHED = "judge.safetensors", "state_dict.pt"
PUBLISHED_GUIDANCE = 7.5
VISUAL, TEXT, SCALE = "visual_projection.weight", "text_projection.weight", "logit_scale"
LORA = "lora."  # prefix of the tensors of a judge that is a LoRA
FIRST = "base.conv_in.weight"  # beside them, to tell its base model
FIRST_SCALE = 2.6592  # ln(1 / 0.07), CLIP's logit scale before training


def load(judge: JudgeConfig, diffusion: LatentDiffusion, base: UNet2DConditionModel, dtype: torch.dtype) -> LatentJudge:
    """Loads a latent judge, frozen, its projections in float32. Raises UserError that names what does not fit.

    base: the base model's UNet without a LoRA of its own; a judge that is a LoRA shares its weights.
    """
    folder = fetch(judge.path, judge.revision, "judge.path", (RECORD, PROJECTIONS, PUBLISHED, "unet/*"))
    if not folder.is_dir():
        raise UserError(f"judge.path: found the file {folder}, expected the folder of a latent judge")
    family, tensors, record = diffusion.family, _projections(folder), record_of(folder)
    rank = record.get("lora_rank")
    if rank:
        check_type_of_lora(folder, dtype, base.dtype)
        unet, encoders = _sharing(base), diffusion.text_encoders
    else:
        unet = _unet(folder, diffusion).to(dtype)
        encoders = [
            load_network(network_kind(family, part), judge.path, judge.revision, part, dtype, "judge.path")
            for part in family.text_encoders
        ]
    built = LatentNetwork(unet, encoders, tensors[VISUAL], tensors.get(TEXT), tensors[SCALE])
    _check_widths(built, tensors, encoders[-1].config, folder)
    if rank:
        _fill_lora(built, rank, tensors, folder)
    guidance = record["guidance"] if judge.guidance is None else judge.guidance
    return LatentJudge(built.to(diffusion.device), diffusion, guidance, record["t_of_step"])


def check_type_of_lora(folder: Path, dtype: torch.dtype, base: torch.dtype) -> None:
    """Raises UserError for a judge that is a LoRA and whose type is not the base model's, whose weights it shares."""
    if dtype != base:
        raise UserError(f"judge.dtype: {folder} is a LoRA on the base model and has its type; leave judge.dtype out")


def begin(
    judge: TrainedJudgeConfig, model: ModelConfig, diffusion: LatentDiffusion, rng: torch.Generator
) -> LatentJudge:
    """Returns the judge with which a training begins: that of judge.path, or where that is null the base model's parts.

    The weights are float32, but for those under a LoRA, which have model.dtype. A fresh text projection is that of
    judge.components, else the identity; a fresh visual projection is drawn from rng (on the CPU).
    """
    base, dtype = BaseModel.find(model), DTYPES[model.dtype if judge.lora_rank else "float32"]
    unet = base.part("unet", dtype)
    if judge.path is None:
        encoders = diffusion.text_encoders if judge.lora_rank else base.text_encoders(torch.float32)
        begun = _fresh(judge, unet, encoders, diffusion, rng)
    else:
        begun = load(judge, diffusion, unet, dtype)
        if begun.network.lora_rank != judge.lora_rank:
            raise UserError(
                f"judge.lora_rank: found {judge.lora_rank}, but {judge.path} was trained with {begun.network.lora_rank}"
            )
    configure_unet(begun.network.unet, model)
    return begun


def _fresh(
    judge: TrainedJudgeConfig,
    unet: UNet2DConditionModel,
    encoders: Sequence[nn.Module],
    diffusion: LatentDiffusion,
    rng: torch.Generator,
) -> LatentJudge:
    text, width = None, encoders[-1].config.projection_dim
    if diffusion.family.pooled_width(unet.config) is None:  # the encoder has no projection of its own
        text = _clip_projection(judge) if judge.components else torch.eye(encoders[-1].config.hidden_size)
        width = len(text)
    features = feature_width(unet)
    visual = torch.randn(width, features, generator=rng) / features**0.5
    network = LatentNetwork(unet, encoders, visual, text, torch.tensor(FIRST_SCALE))
    if judge.lora_rank:
        network.add_lora(judge.lora_rank, rng.initial_seed())
    return LatentJudge(network.to(diffusion.device), diffusion, judge.guidance or 1.0, t_of_step=False)


def save(folder: Path, judge: LatentJudge) -> None:
    """Writes a folder that `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    network = judge.network
    tensors = {VISUAL: network.visual_projection, TEXT: network.text_projection, SCALE: network.logit_scale}
    record = {"kind": judge.kind, "guidance": judge.guidance, "t_of_step": judge.t_of_step}
    if network.lora_rank:
        tensors |= {f"{LORA}{name}": value for name, value in lora_state(network.unet).items()}
        tensors[FIRST] = network.unet.conv_in.weight.float()
        record["lora_rank"] = network.lora_rank
    else:
        network.unet.save_pretrained(folder / "unet")
        for part, encoder in zip(judge.family.text_encoders, network.encoders, strict=True):
            encoder.save_pretrained(folder / part)
    kept = {name: value.detach().contiguous() for name, value in tensors.items() if value is not None}
    save_tensors(kept, folder / PROJECTIONS)
    (folder / RECORD).write_text(json.dumps(record))


def _sharing(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """Returns the encoder of a UNet as a module of its own, on the same weights."""
    with torch.device("meta"):
        unet = without_decoder(UNet2DConditionModel.from_config(base.config))
    weights = {name: value for name, value in base.state_dict().items() if name.split(".")[0] not in DECODER}
    unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False)


def _fill_lora(network: LatentNetwork, rank: int, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Adds the LoRA of a judge's file. Raises UserError where it was trained on another base model."""
    first, recorded = network.unet.conv_in.weight.float(), tensors.get(FIRST)
    if recorded is None or recorded.shape != first.shape or (first.cpu() - recorded).norm() > 0.01 * recorded.norm():
        raise UserError(
            f"judge.path: {folder} is a LoRA on another base model than model.path; use the one that it was trained on"
        )
    network.add_lora(rank, 0)
    lora = {name.removeprefix(LORA): value for name, value in tensors.items() if name.startswith(LORA)}
    expected = {name: value.shape for name, value in lora_state(network.unet).items()}
    if {name: value.shape for name, value in lora.items()} != expected:
        raise UserError(f"judge.path: the LoRA in {folder} does not fit its networks, expected {len(expected)} tensors")
    set_lora_state(network.unet, lora)


def _clip_projection(judge: TrainedJudgeConfig) -> Tensor:
    """Returns the text projection of the CLIP that judge.components names."""
    folder = fetch(judge.components, None, "judge.components", ("config.json", "model*.safetensors*"))
    weights = read_weights(folder, "judge.components")
    if TEXT not in weights:
        raise UserError(f"judge.components: {folder} has no {TEXT}, expected a CLIP, such as the one of the base model")
    return weights[TEXT].float()


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


def record_of(folder: Path) -> dict:
    """Returns the conventions of scoring: those that `save` wrote, without a record the published ones."""
    file = folder / RECORD
    if not file.is_file():
        return {"guidance": PUBLISHED_GUIDANCE, "t_of_step": True}
    record = read_json(file, "judge.path")
    if record.get("kind") != LatentJudge.kind:
        raise UserError(f"judge.kind: found latent, but {file} names the kind {record.get('kind')!r}")
    if not isinstance(record.get("guidance"), (int, float)) or not isinstance(record.get("t_of_step"), bool):
        raise UserError(f"judge.path: {file} lacks the number guidance or the truth value t_of_step")
    if not isinstance(record.get("lora_rank"), (int, type(None))):
        raise UserError(f"judge.path: {file} has lora_rank {record['lora_rank']!r}, expected a number")
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
    middle, features = network.unet.config.block_out_channels[-1], feature_width(network.unet)
    visual, scale = tensors[VISUAL], tensors[SCALE]
    fits = visual.ndim == 2 and visual.shape[1] in (middle, features) and scale.numel() == 1
    projected = TEXT in tensors
    shape = tensors[TEXT].shape if projected else (text.projection_dim, text.projection_dim)
    fits = fits and tuple(shape) == (len(visual), text.hidden_size if projected else len(visual))
    if not fits:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UserError(
            f"judge.path: the projections in {folder} ({found}) do not fit its networks, whose UNet has features of "
            f"{features} numbers, {middle} of them in the middle"
        )
