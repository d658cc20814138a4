"""Reads a model's JSON configurations and the header of a checkpoint, without the weights."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line, short
from ..user_files import parse_json, read_text

MOST = 10**6
COUNTS = {  # what is computed with, and the least that it may be
    **dict.fromkeys(("hidden_size", "vocab_size", "max_position_embeddings", "latent_channels", "layers_per_block"), 1),
    **{"transformer_layers_per_block": 1, "steps_offset": 0},
}


def read_config(folder: Path, part: str, key: str) -> dict:
    """Reads the JSON configuration of one part of a model folder. key: the configuration key that names the folder.

    Raises UserError if the folder has no such part or file.
    """
    if not (folder / part).is_dir():
        raise UserError(f"{key}: {folder} has no folder {part}/, which every model in diffusers format has")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not file.is_file():
        raise UserError(f"{key}: {folder / part} has no {file.name}")
    config = read_json(file, key)
    for name, least in COUNTS.items():
        value = config.get(name, least)
        by_block = isinstance(value, list) and name.endswith("_per_block")
        if not by_block and not (type(value) is int and least <= value <= MOST):
            found = f"{file} has {name} {short(value)}"
            raise UserError(f"{key}: {found}, expected a whole number from {least} to {MOST:,}")
    if not isinstance(config.get("model_type", ""), str):
        raise UserError(f"{key}: {file} has model_type {short(config['model_type'])}, expected a name")
    return config


def read_index(folder: Path, key: str) -> dict:
    """Reads model_index.json of a model folder; returns {} if there is none. Raises UserError if it is not JSON."""
    file = folder / "model_index.json"
    return read_json(file, key) if file.is_file() else {}


def read_json(file: Path, key: str) -> dict:
    """Reads a file that holds a JSON object. key: the configuration key at fault, for messages.

    Raises UserError if the file cannot be read, is not JSON, or holds another kind of value.
    """
    try:
        value = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{key}: {file} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_shapes(file: Path, key: str) -> dict[str, list[int]]:
    """Returns tensor shapes by name from the header of a .safetensors file. Raises UserError if it is not one."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {file} is no .safetensors file ({one_line(error)})") from None
