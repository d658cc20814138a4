"""What the files of a model say before any weights are read: configurations in JSON, and the head of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError


def read_config(folder: Path, part: str, key: str) -> dict:
    """The JSON configuration of one part of a model folder. key: where the folder stands in the recipe.

    Raises UserError where there is none.
    """
    if not (folder / part).is_dir():
        raise UserError(f"{key}: {folder} has no folder {part}/, which every model in diffusers format has")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not file.is_file():
        raise UserError(f"{key}: {folder / part} has no {file.name}")
    return read_json(file, key)


def read_index(folder: Path, key: str) -> dict:
    """model_index.json of a model folder; empty where it has none. Raises UserError where it is no JSON."""
    file = folder / "model_index.json"
    return read_json(file, key) if file.is_file() else {}


def read_json(file: Path, key: str) -> dict:
    """The JSON object in a file. Raises UserError where there is none."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no JSON object")
    return config


def read_shapes(file: Path, key: str) -> dict[str, list[int]]:
    """The shape of every tensor of a .safetensors file, from its header. Raises UserError where it is none."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {file} is no .safetensors file ({error})") from None
