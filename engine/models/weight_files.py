"""Reads files of weights as their authors published them, and fills networks with them.

It reads safetensors and PyTorch's pickles, of which it takes tensors alone and runs no code; one file, or the shards
that an index names. Which tensors a network needs, and what they are called, its caller knows.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError, one_line, short
from .model_files import read_json

SAFETENSORS, PICKLES = "model.safetensors", "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
LFS_POINTER = b"version https://git-lfs"


def weights_file(folder: Path) -> Path | None:
    """Finds a folder's file of weights, or the index of its shards; safetensors are preferred to pickles."""
    names = (SAFETENSORS, SAFETENSORS + ".index.json", PICKLES, PICKLES + ".index.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """Reads every tensor of a file, of a folder, or of the shards that an index file names, to the CPU.

    key: what names `path`, for messages. Raises UserError that names the file, what was found and what was expected.
    """
    file = weights_file(path) if path.is_dir() else path
    if file is None:
        raise UserError(f"{key}: {path} has neither {SAFETENSORS} nor {PICKLES}, nor an index of their shards")
    if not file.name.endswith(".index.json"):
        return read_tensors(file, key)
    state = {}
    for shard in shards_of(file, key):
        state |= read_tensors(shard, key)
    return state


def shards_of(index: Path, key: str) -> list[Path]:
    """Returns the files that an index of shards names, all of which lie beside it. Raises UserError otherwise."""
    names = read_json(index, key).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{key}: {index} has no weight_map, expected the file of each tensor")
    for tensor, name in names.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\\" in name:
            raise UserError(
                f"{key}: {index} names {short(name)} for {short(tensor)}, expected the name of a file beside it"
            )
    shards = [index.parent / name for name in sorted(set(names.values()))]
    lacking = [shard.name for shard in shards if not shard.is_file()]
    if lacking:
        raise UserError(f"{key}: {index.parent} lacks {shortened(lacking)}, which {index.name} names")
    return shards


def read_tensors(file: Path, key: str) -> dict[str, Tensor]:
    """Reads one file of tensors by name, which in a pickle may lie under `state_dict`. Raises UserError as above."""
    if file.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise UserError(
            f"{key}: found the file {file}, expected a folder, a .safetensors or a {', '.join(PICKLE_SUFFIXES)} file"
        )
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, key, f"cannot be read as safetensors ({one_line(error)})") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a pickle may raise anything; torch's own message advises to run its code
        why = f"is no PyTorch file of tensors alone, or is damaged; nothing else is read from a {file.suffix}"
        raise _unreadable(file, key, why) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{key}: {file} holds no state dict; found {_described(state)}, expected names and tensors")
    return state


def save_tensors(tensors: dict[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file with the mode that the umask gives; safetensors alone lets only its owner read it."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata=header)
    file.chmod(stat.S_IMODE(mode))


def check_fit(network: nn.Module, state: dict[str, Tensor], new_keys: Collection[str], file: str) -> None:
    """Raises UserError that lists every missing, unexpected and misshapen tensor; those in `new_keys` may be missing.

    The position_ids of older checkpoints are removed from the state if they count from 0, as they should.
    file: begins the sentence, "key: the tensors in FILE do not fit X".
    """
    expected_state, bad_positions = network.state_dict(), []
    for name, expected in _position_ids(network).items():
        if not torch.equal(state.pop(name, expected).reshape(1, -1), expected):
            bad_positions.append(name)
    misshapen = [
        f"{name} of {tuple(state[name].shape)} for {tuple(expected_state[name].shape)}"
        for name in sorted(expected_state.keys() & state.keys())
        if state[name].shape != expected_state[name].shape
    ]
    faults = {
        "missing": sorted(expected_state.keys() - state.keys() - set(new_keys)),
        "unexpected": sorted(state.keys() - expected_state.keys()),
        "of the wrong shape": misshapen,
        "not counting from 0": bad_positions,
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault} ({shortened(names)})" for fault, names in faults.items() if names)
        raise UserError(f"{file}: {listed}")


def check_finite(state: Mapping[str, Tensor], file: str) -> None:
    """Raises UserError that names the first tensor with a NaN or an infinity in it; file: "key: FILE".

    It shows in the tensor's sum, so that nothing is copied. A sum that is not finite proves nothing, because that of
    large finite numbers overflows too: only then is each number looked at.
    """
    for name, value in state.items():
        wide = value.float() if value.element_size() == 1 else value  # PyTorch sums no float8
        if not wide.sum().isfinite() and not (right := wide.isfinite()).all():
            count, dtype = f"{int((~right).sum()):,} of {value.numel():,}", str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{file}: found {count} numbers that are NaN or infinite as {dtype} in {name}, expected finite ones; "
                "fetch or export the weights anew"
            )


def fill(network: nn.Module, state: dict[str, Tensor], new_keys: Collection[str], file: str) -> None:
    """Assigns tensors, in float32 on the CPU, to a network on the meta device; `new_keys` get uninitialised memory.

    The state is emptied on the way, so that a billion parameters are not in memory twice. file, and the UserError: as
    of check_finite.
    """
    check_finite(state, file)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    filled = {name: torch.empty(shapes[name]) for name in new_keys}
    while state:  # copied even from float32: the last bits of a product depend on how its operands lie in memory
        name, value = state.popitem()
        filled[name] = value.to(torch.float32, copy=True)
    network.load_state_dict(filled, assign=True)
    for name, positions in _position_ids(network).items():
        module, _, buffer = name.rpartition(".")
        setattr(network.get_submodule(module), buffer, positions)


def shortened(names: Iterable[str], limit: int = 20) -> str:
    """Lists names; of very many, only the first `limit`."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _position_ids(network: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of transformers that count positions from 0, (1, L) each; no state dict holds them."""
    names = [(name, buffer) for name, buffer in network.named_buffers() if name.endswith("position_ids")]
    return {name: torch.arange(buffer.shape[-1]).unsqueeze(0) for name, buffer in names}


def _unreadable(file: Path, key: str, why: str) -> UserError:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            why = "is a Git LFS pointer, a few lines in place of the weights; `git lfs pull` fetches them"
    return UserError(f"{key}: {file} {why}")


def _described(state: Any) -> str:
    """Describes the contents of a pickle that is no state dict."""
    if not isinstance(state, dict):
        return type(state).__name__
    name, value = next((k, v) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
    return f"{type(value).__name__} under {name!r}"
