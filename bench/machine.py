"""Names the machine that a bench runs on, and keeps what it measured in bench/results/<machine>/."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from strop.engine.config.training import Config
from strop.engine.errors import UserError
from strop.engine.runtime.files import write_atomically
from strop.engine.runtime.ranks import start

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> str:
    """Returns the GPU's name, or the number of CPU cores and their architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine()} CPU"


def start_bench(name: str, config: Config) -> torch.device:
    """Returns the device of a recipe. Raises UserError where that is a CPU and the model would be of full size."""
    device = start(config.run.device).device
    if device.type == "cpu" and not Path(config.model.path).exists():
        raise UserError(f"{name}: {config.model.path} is not on this machine, and at full size a CPU takes hours")
    return device


def folder(name: str) -> Path:
    """Returns where the results of the machine of this name lie."""
    return RESULTS / name.replace(" ", "-")


def write(record: dict, name: str, out: Path | None = None) -> Path:
    """Writes a record, which names its "machine", as NAME.json to `out` or the machine's folder; returns the file."""
    target = (out or folder(record["machine"])) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(record, indent=2) + "\n")
    return target
