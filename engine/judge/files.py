"""Reads and writes a judge's files.

It reads a CLIP folder or hub repository (PickScore), the .bin file of the paper's authors, whose tensor names have the
prefix `model.`, and a folder that it wrote. safetensors are preferred to .bin; either may be one file or shards. No
tensor may be missing or left over. judge/model.py turns images and prompts into scores.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..config.training import JudgeConfig
from ..errors import UserError
from ..models.clip_files import PICKSCORE_CLIP, TOKENIZER, ClipFolders, clip_network, clip_tokenizer, mean_and_std
from ..models.hub import fetch
from ..models.model_files import read_json
from ..models.weight_files import SAFETENSORS, check_fit, fill, read_weights, save_tensors, weights_file
from .clip import TimeConditionedCLIP

RECORD = "judge.json"
SETTINGS = ("config.json", "preprocessor_config.json", RECORD, *TOKENIZER)
PREFIX = "model."  # of the published weights
COMPONENTS = (
    f"name the folder or hub id of the CLIP that has it, {PICKSCORE_CLIP} for PickScore and all judges made of it"
)


@dataclass(frozen=True, slots=True)
class JudgeFiles:
    """The contents of a judge's files: network (float32, CPU), tokenizer, mean and std of images in [0, 1]."""

    clip: TimeConditionedCLIP
    tokenizer: CLIPTokenizer
    mean: list[float]
    std: list[float]


def load(judge: JudgeConfig, rng: torch.Generator | None) -> JudgeFiles:
    """Reads a judge of the kind judge.kind.

    rng (on the CPU): given if the judge is to be trained. A plain CLIP is then accepted: its modulation starts as the
    identity, its timestep embedder is drawn from rng. Raises UserError that names the key and what is wrong.
    """
    if judge.kind == "latent":
        raise UserError(
            "judge.kind: found latent, which this command does not read; expected spm, spm_no_step or pickscore"
        )
    if judge.guidance is not None:
        raise UserError(f"judge.guidance: found {judge.guidance}, but only a latent judge has guidance; leave it out")
    if rng is not None and judge.dtype not in (None, "float32"):
        raise UserError(f"judge.dtype: found {judge.dtype}, but a judge is trained in float32; leave it out")
    path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "model*.safetensors*"))
    if path.is_dir() and not weights_file(path):  # a hub id's .bin files are fetched only if needed
        path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "pytorch_model*.bin*"))
    paths = {"judge.path": path}
    if judge.components:
        paths["judge.components"] = fetch(judge.components, None, "judge.components", SETTINGS)
    folders = ClipFolders(paths, "judge.components", COMPONENTS)
    network = clip_network(folders)
    tokenizer = clip_tokenizer(folders, network.config.text_config.vocab_size)
    mean, std = mean_and_std(folders)
    state = without_prefix(read_weights(path, "judge.path"))
    plain = not any(map(is_modulation, state))
    with torch.device("meta"):
        clip = TimeConditionedCLIP(network, modulated=not (plain and judge.kind == "pickscore"))
    new_keys = {name for name in clip.state_dict() if is_modulation(name)} if plain else set()
    check_fit(clip, state, new_keys, f"judge.path: the tensors in {path} do not fit the CLIP of its config.json")
    _check_kind(judge, plain, path, rng is not None)
    fill(clip, state, new_keys, f"judge.path: {path}")
    if new_keys:
        clip.reset_modulation(rng)
    return JudgeFiles(clip, tokenizer, mean, std)


def save(folder: Path, files: JudgeFiles, kind: str) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json, the tokenizer, and the kind in judge.json."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = files.clip
    clip.config.save_pretrained(folder)
    files.tokenizer.save_pretrained(folder)
    state = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_tensors(state, folder / SAFETENSORS, {"format": "pt"})
    size = clip.config.vision_config.image_size
    pixels = {"image_mean": files.mean, "image_std": files.std, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2))
    (folder / RECORD).write_text(json.dumps({"kind": kind}))


def is_modulation(name: str) -> bool:
    """Whether a step-aware judge has a tensor of this name and a plain CLIP has not."""
    return "adaLN_modulation." in name or name.startswith("t_embedder.")


def _check_kind(judge: JudgeConfig, plain: bool, path: Path, training: bool) -> None:
    """Raises UserError if the weights are not of the kind that the recipe asks for. plain: they are a plain CLIP's."""
    kind = judge.kind
    if kind == "pickscore" and training:
        raise UserError("judge.kind: found pickscore, which is not trained; expected spm or spm_no_step")
    if plain:
        if kind != "pickscore" and not training:
            raise UserError(
                f"judge.kind: found {kind}, but {judge.path} is a plain CLIP without timestep modulation; set "
                "judge.kind=pickscore, or train a judge from it with engine/train_judge.py"
            )
    elif kind != (recorded := _recorded_kind(path)):
        raise UserError(
            f"judge.kind: found {kind}, but {judge.path} is a judge of kind {recorded}; set judge.kind={recorded}"
        )


def _recorded_kind(path: Path) -> str:
    """Reads the kind of judge that `save` wrote beside the weights; without a record it is the published kind."""
    record = path / RECORD
    kind = read_json(record, "judge.path").get("kind") if record.is_file() else "spm"
    if kind not in ("spm", "spm_no_step"):
        raise UserError(f"judge.path: {record} names the kind {kind!r}, expected spm or spm_no_step")
    return kind


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under TimeConditionedCLIP's names: the prefix of the published weights is removed."""
    if not all(name.startswith(PREFIX) for name in state):
        return state
    return {name.removeprefix(PREFIX): value for name, value in state.items()}
