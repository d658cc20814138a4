"""How a judge lies on disk: what is read, what is refused, what is written.

Read are a CLIP folder or hub repository (PickScore), the .bin file of the paper's authors, whose names carry the prefix
`model.`, and a folder written here; safetensors before .bin, either of them in one file or in shards. No tensor may
be missing or left over. What the judge does with images and prompts is judge/model.py's.
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
from ..errors import UserError
from ..models.hub import fetch
from .clip import TimeConditionedCLIP

RECORD = "judge.json"
SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
SETTINGS = ("config.json", "preprocessor_config.json", RECORD, *TOKENIZER)
PREFIX = "model."  # of the published weights
OF_PICKSCORE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # has the tokenizer and preprocessor that PickScore_v1 lacks


@dataclass(frozen=True, slots=True)
class JudgeFiles:
    """What a judge is made of: its network on the CPU in float32, tokenizer, and mean and std of images in [0, 1]."""

    clip: TimeConditionedCLIP
    tokenizer: CLIPTokenizer
    mean: list[float]
    std: list[float]


def load(judge: JudgeConfig, rng: torch.Generator | None) -> JudgeFiles:
    """Reads a judge of the kind that judge.kind says.

    rng (on the CPU): the judge is to be trained, so that a plain CLIP will do; its modulation starts as the identity,
    with a timestep embedder drawn from rng. Raises UserError naming the key and what is missing, left over or unfit.
    """
    path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "model*.safetensors*"))
    if path.is_dir() and not _weights_file(path):  # of a hub id the .bin files are fetched only where they are needed
        path = fetch(judge.path, judge.revision, "judge.path", (*SETTINGS, "pytorch_model*.bin*"))
    homes = {"judge.path": path}
    if judge.components:
        homes["judge.components"] = fetch(judge.components, None, "judge.components", SETTINGS)
    network = _network(homes)
    tokenizer = _tokenizer(homes, network.config)
    mean, std = _mean_and_std(homes)
    state = without_prefix(_read_weights(path))
    plain = not any(map(is_modulation, state))
    with torch.device("meta"):
        clip = TimeConditionedCLIP(network, modulated=not (plain and judge.kind == "pickscore"))
    fresh = {name for name in clip.state_dict() if is_modulation(name)} if plain else set()
    check_fit(clip, state, fresh, path)
    _check_kind(judge, plain, path, rng is not None)
    fill(clip, state, fresh)
    if fresh:
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
    """Whether a tensor of this name is what a step-aware judge has beyond a plain CLIP."""
    return "adaLN_modulation." in name or name.startswith("t_embedder.")


def check_fit(clip: TimeConditionedCLIP, state: dict[str, Tensor], fresh: set[str], path: Path) -> None:
    """Raises UserError that lists every missing, unexpected and misshapen tensor of a state; those in `fresh` may miss.

    The position_ids that older checkpoints hold are taken out of the state where they count from 0, as they always do.
    """
    own, odd = clip.state_dict(), []
    for tower in ("text_model", "vision_model"):
        name, expected = f"{tower}.embeddings.position_ids", _position_ids(clip, tower)
        if not torch.equal(state.pop(name, expected).reshape(1, -1), expected):
            odd.append(name)
    misshapen = [
        f"{name} of {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    faults = {
        "missing": sorted(own.keys() - state.keys() - fresh),
        "unexpected": sorted(state.keys() - own.keys()),
        "of the wrong shape": misshapen,
        "not counting from 0": odd,
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names)
        raise UserError(f"judge.path: the tensors in {path} do not fit the CLIP of its config.json: {found}")


def fill(clip: TimeConditionedCLIP, state: dict[str, Tensor], fresh: set[str]) -> None:
    """Gives a network on the meta device its tensors, in float32 on the CPU; those in `fresh` are left to be set.

    The state is emptied on the way, so that a billion parameters do not lie in memory twice.
    """
    own = clip.state_dict()
    filled = {name: torch.empty(own[name].shape) for name in fresh}
    while state:  # copied even from float32: the last bits of a product depend on how its operands lie in memory
        name, value = state.popitem()
        filled[name] = value.to(torch.float32, copy=True)
    clip.load_state_dict(filled, assign=True)
    for tower in ("text_model", "vision_model"):
        getattr(clip, tower).embeddings.position_ids = _position_ids(clip, tower)


def _position_ids(clip: TimeConditionedCLIP, tower: str) -> Tensor:
    return torch.arange(getattr(clip, tower).embeddings.position_embedding.num_embeddings).unsqueeze(0)


def _check_kind(judge: JudgeConfig, plain: bool, path: Path, training: bool) -> None:
    """Whether the weights are of the kind that the recipe asks for."""
    kind = judge.kind
    if kind == "pickscore" and training:
        raise UserError("judge.kind: found pickscore, which is not trained; expected spm or spm_no_step")
    if plain:
        if kind != "pickscore" and not training:
            raise UserError(
                f"judge.kind: found {kind}, but {judge.path} is a plain CLIP without timestep modulation; set "
                "judge.kind=pickscore, or train a judge from it with engine/train_judge.py"
            )
    elif kind != (recorded := _recorded(path)):
        raise UserError(
            f"judge.kind: found {kind}, but {judge.path} is a judge of kind {recorded}; set judge.kind={recorded}"
        )


def _recorded(path: Path) -> str:
    """The kind of judge that `save` wrote beside the weights; without a record, the published one."""
    record = path / RECORD
    kind = _read_json(record).get("kind") if record.is_file() else "spm"
    if kind not in ("spm", "spm_no_step"):
        raise UserError(f"judge.path: {record} names the kind {kind!r}, expected spm or spm_no_step")
    return kind


def _network(homes: dict[str, Path]) -> CLIPModel:
    """The plain CLIP of config.json on the meta device: a billion parameters are not drawn first to be filled then."""
    key, file = _first(homes, "config.json")
    found = _read_json(file, key)
    kind = found.get("model_type", found.get("_class_name"))
    if kind != "clip":
        raise UserError(f"{key}: {file} is of a model of type {kind}, expected clip")
    try:
        with torch.device("meta"):
            return CLIPModel(CLIPConfig.from_pretrained(file.parent))
    except Exception as error:  # each value has its own way of failing, in transformers or in torch
        raise UserError(f"{key}: {file} describes no CLIP ({_line(error)})") from None


def _tokenizer(homes: dict[str, Path], config: CLIPConfig) -> CLIPTokenizer:
    # Where one of these files is missing, transformers makes a tokenizer of three words or of letters and says nothing.
    key, file = _first(homes, "tokenizer.json", "vocab.json")
    if file.name == "vocab.json":
        _first({key: file.parent}, "merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(file.parent)
    except Exception as error:  # the parser of tokenizer.json raises Exception itself
        raise UserError(f"{key}: the tokenizer in {file.parent} cannot be read ({_line(error)})") from None
    most = config.text_config.vocab_size
    if len(tokenizer) > most:
        raise UserError(
            f"{key}: the tokenizer in {file.parent} has {len(tokenizer)} tokens, but the judge has embeddings of {most}"
        )
    return tokenizer


def _mean_and_std(homes: dict[str, Path]) -> tuple[list[float], list[float]]:
    key, file = _first(homes, "preprocessor_config.json")
    found = _read_json(file, key)
    mean, std = found.get("image_mean"), found.get("image_std")
    for each in (mean, std):
        if not (isinstance(each, list) and len(each) == 3 and {*map(type, each)} <= {int, float}):
            raise UserError(f"{key}: {file} has image_mean {mean} and image_std {std}, expected three numbers each")
    return mean, std


def _first(homes: dict[str, Path], *names: str) -> tuple[str, Path]:
    """The first of the named files, in the judge's own folder or else in its components, after the key of that."""
    for key, folder in homes.items():
        for name in names:
            if (folder / name).is_file():
                return key, folder / name
    what = "tokenizer" if "tokenizer.json" in names else names[0]
    found = f"{' and '.join(map(str, homes.values()))} {'have' if len(homes) > 1 else 'has'} no {what}"
    raise UserError(
        f"judge.components: {found}; name the folder or hub id of the CLIP that has it, {OF_PICKSCORE} for PickScore "
        "and all judges made of it"
    )


def _weights_file(folder: Path) -> Path | None:
    names = (SAFETENSORS, SAFETENSORS + ".index.json", PICKLES, PICKLES + ".index.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, of a folder, or of the shards that the folder's index names."""
    file = _weights_file(path) if path.is_dir() else path
    if file is None:
        raise UserError(f"judge.path: {path} has neither {SAFETENSORS} nor {PICKLES}, nor an index of their shards")
    if not file.name.endswith(".index.json"):
        return _read_tensors(file)
    shards = _read_json(file).get("weight_map")
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
            raise UserError(f"judge.path: {file} cannot be read as safetensors ({_line(error)})") from None
    if file.suffix != ".bin":
        raise UserError(f"judge.path: found the file {file}, expected a folder, a .safetensors or a .bin file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a stranger's pickle provokes; the message of torch advises to run its code
        raise UserError(
            f"judge.path: {file} is no PyTorch file of tensors alone, or is damaged; nothing else is read from a .bin"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"judge.path: {file} holds no state dict; found {_kind(state)}, expected names and tensors")
    return state


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of TimeConditionedCLIP, whether or not they had the prefix of the published ones."""
    if not all(name.startswith(PREFIX) for name in state):
        return state
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def _read_json(file: Path, key: str = "judge.path") -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read ({_line(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds {type(found).__name__}, expected an object")
    return found


def _kind(state: Any) -> str:
    """What stands in a pickle instead of a state dict."""
    if not isinstance(state, dict):
        return type(state).__name__
    name, value = next((k, v) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
    return f"{type(value).__name__} under {name!r}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _some(names: Iterable[str], most: int = 20) -> str:
    """The names, or the first of very many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
