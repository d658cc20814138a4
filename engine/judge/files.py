"""Reads and writes a judge's files.

It reads a CLIP folder or hub repository (PickScore), the .bin file of the paper's authors, whose tensor names have the
prefix `model.`, and a folder that it wrote. safetensors are preferred to .bin; either may be one file or shards. No
tensor may be missing or left over. judge/model.py turns images and prompts into scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..config.training import JudgeConfig
from ..errors import UserError, one_line
from ..models.hub import fetch
from ..models.model_files import read_json
from .clip import TimeConditionedCLIP

RECORD = "judge.json"
SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
SETTINGS = ("config.json", "preprocessor_config.json", RECORD, *TOKENIZER)
PREFIX = "model."  # of the published weights
PICKSCORE_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # has the tokenizer and preprocessor that PickScore_v1 lacks


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
    path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "model*.safetensors*"))
    if path.is_dir() and not _weights_file(path):  # a hub id's .bin files are fetched only if needed
        path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "pytorch_model*.bin*"))
    folders = {"judge.path": path}
    if judge.components:
        folders["judge.components"] = fetch(judge.components, None, "judge.components", SETTINGS)
    network = _network(folders)
    tokenizer = _tokenizer(folders, network.config)
    mean, std = _mean_and_std(folders)
    state = without_prefix(_read_weights(path))
    plain = not any(map(is_modulation, state))
    with torch.device("meta"):
        clip = TimeConditionedCLIP(network, modulated=not (plain and judge.kind == "pickscore"))
    new_keys = {name for name in clip.state_dict() if is_modulation(name)} if plain else set()
    check_fit(clip, state, new_keys, path)
    _check_kind(judge, plain, path, rng is not None)
    fill(clip, state, new_keys)
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
    save_file(state, folder / SAFETENSORS, metadata={"format": "pt"})
    size = clip.config.vision_config.image_size
    pixels = {"image_mean": files.mean, "image_std": files.std, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2))
    (folder / RECORD).write_text(json.dumps({"kind": kind}))


def is_modulation(name: str) -> bool:
    """Whether a step-aware judge has a tensor of this name and a plain CLIP has not."""
    return "adaLN_modulation." in name or name.startswith("t_embedder.")


def check_fit(clip: TimeConditionedCLIP, state: dict[str, Tensor], new_keys: set[str], path: Path) -> None:
    """Raises UserError that lists every missing, unexpected and misshapen tensor; those in `new_keys` may be missing.

    The position_ids of older checkpoints are removed from the state if they count from 0, as they should.
    """
    expected_state, bad_positions = clip.state_dict(), []
    for tower in ("text_model", "vision_model"):
        name, expected = f"{tower}.embeddings.position_ids", _position_ids(clip, tower)
        if not torch.equal(state.pop(name, expected).reshape(1, -1), expected):
            bad_positions.append(name)
    misshapen = [
        f"{name} of {tuple(state[name].shape)} for {tuple(expected_state[name].shape)}"
        for name in sorted(expected_state.keys() & state.keys())
        if state[name].shape != expected_state[name].shape
    ]
    faults = {
        "missing": sorted(expected_state.keys() - state.keys() - new_keys),
        "unexpected": sorted(state.keys() - expected_state.keys()),
        "of the wrong shape": misshapen,
        "not counting from 0": bad_positions,
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault} ({_shortened(names)})" for fault, names in faults.items() if names)
        raise UserError(f"judge.path: the tensors in {path} do not fit the CLIP of its config.json: {listed}")


def fill(clip: TimeConditionedCLIP, state: dict[str, Tensor], new_keys: set[str]) -> None:
    """Assigns tensors, in float32 on the CPU, to a network on the meta device; `new_keys` get uninitialised memory.

    The state is emptied on the way, so that a billion parameters are not in memory twice.
    """
    shapes = {name: value.shape for name, value in clip.state_dict().items()}
    filled = {name: torch.empty(shapes[name]) for name in new_keys}
    while state:  # copied even from float32: the last bits of a product depend on how its operands lie in memory
        name, value = state.popitem()
        filled[name] = value.to(torch.float32, copy=True)
    clip.load_state_dict(filled, assign=True)
    for tower in ("text_model", "vision_model"):
        getattr(clip, tower).embeddings.position_ids = _position_ids(clip, tower)


def _position_ids(clip: TimeConditionedCLIP, tower: str) -> Tensor:
    return torch.arange(getattr(clip, tower).embeddings.position_embedding.num_embeddings).unsqueeze(0)


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


def _network(folders: dict[str, Path]) -> CLIPModel:
    """Builds the plain CLIP of config.json on the meta device, which spares initialising a billion parameters."""
    key, file = _first(folders, "config.json")
    config = read_json(file, key)
    kind = config.get("model_type", config.get("_class_name"))
    if kind != "clip":
        raise UserError(f"{key}: {file} is of a model of type {kind}, expected clip")
    try:
        with torch.device("meta"):
            return CLIPModel(CLIPConfig.from_pretrained(file.parent))
    except Exception as error:  # transformers and torch raise many kinds for bad values
        raise UserError(f"{key}: {file} describes no CLIP ({one_line(error)})") from None


def _tokenizer(folders: dict[str, Path], config: CLIPConfig) -> CLIPTokenizer:
    # Where one of these files is missing, transformers makes a tokenizer of three words or of letters and says nothing.
    key, file = _first(folders, "tokenizer.json", "vocab.json")
    if file.name == "vocab.json":
        _first({key: file.parent}, "merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(file.parent)
    except Exception as error:  # the parser of tokenizer.json raises Exception itself
        raise UserError(f"{key}: the tokenizer in {file.parent} cannot be read ({one_line(error)})") from None
    vocab_size = config.text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {file.parent} has {len(tokenizer)} tokens, "
            f"but the judge has embeddings of {vocab_size}"
        )
    return tokenizer


def _mean_and_std(folders: dict[str, Path]) -> tuple[list[float], list[float]]:
    key, file = _first(folders, "preprocessor_config.json")
    config = read_json(file, key)
    mean, std = config.get("image_mean"), config.get("image_std")
    for values in (mean, std):
        if not (isinstance(values, list) and len(values) == 3 and {*map(type, values)} <= {int, float}):
            raise UserError(f"{key}: {file} has image_mean {mean} and image_std {std}, expected three numbers each")
    return mean, std


def _first(folders: dict[str, Path], *names: str) -> tuple[str, Path]:
    """Finds the first of the named files in the judge's folder, then in its components: (configuration key, file)."""
    for key, folder in folders.items():
        for name in names:
            if (folder / name).is_file():
                return key, folder / name
    missing_file = "tokenizer" if "tokenizer.json" in names else names[0]
    where = f"{' and '.join(map(str, folders.values()))} {'have' if len(folders) > 1 else 'has'} no {missing_file}"
    raise UserError(
        f"judge.components: {where}; name the folder or hub id of the CLIP that has it, {PICKSCORE_CLIP} for PickScore "
        "and all judges made of it"
    )


def _weights_file(folder: Path) -> Path | None:
    names = (SAFETENSORS, SAFETENSORS + ".index.json", PICKLES, PICKLES + ".index.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of a file, of a folder, or of the shards that an index file names."""
    file = _weights_file(path) if path.is_dir() else path
    if file is None:
        raise UserError(f"judge.path: {path} has neither {SAFETENSORS} nor {PICKLES}, nor an index of their shards")
    if not file.name.endswith(".index.json"):
        return _read_tensors(file)
    shards = read_json(file, "judge.path").get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"judge.path: {file} has no weight_map")
    state = {}
    for name in sorted(set(shards.values())):
        if not (file.parent / name).is_file():
            raise UserError(f"judge.path: {file.parent} lacks {name}, which {file.name} names")
        state |= _read_tensors(file.parent / name)
    return state


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"judge.path: {file} cannot be read as safetensors ({one_line(error)})") from None
    if file.suffix != ".bin":
        raise UserError(f"judge.path: found the file {file}, expected a folder, a .safetensors or a .bin file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a pickle may raise anything; torch's own message advises to run its code
        raise UserError(
            f"judge.path: {file} is no PyTorch file of tensors alone, or is damaged; nothing else is read from a .bin"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(
            f"judge.path: {file} holds no state dict; found {_described(state)}, expected names and tensors"
        )
    return state


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under TimeConditionedCLIP's names: the prefix of the published weights is removed."""
    if not all(name.startswith(PREFIX) for name in state):
        return state
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def _described(state: Any) -> str:
    """Describes the contents of a pickle that is no state dict."""
    if not isinstance(state, dict):
        return type(state).__name__
    name, value = next((k, v) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
    return f"{type(value).__name__} under {name!r}"


def _shortened(names: Iterable[str], limit: int = 20) -> str:
    """Lists names; of very many, only the first `limit`."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
