"""Stores on disk what frozen models compute from preference pairs, for all runs.

An entry is a small file, a checksum followed by safetensors. Its name is a hash of everything that it depends on, so no
entry is out of date: a changed model, resolution, image or caption has another name. pair_scan.py recomputes entries
that are missing or damaged. Nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import UserError

FORMAT = 2  # of the entries; a part of their names
CHECKSUM = 16  # bytes, at the start of an entry


class PairCache:
    """A folder of entries that several processes and runs may share."""

    def __init__(self, folder: Path):
        """Creates the folder. Raises UserError if it cannot be written."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"data.cache: {folder} cannot be written ({error.strerror}); choose another folder, or null for none"
            ) from None

    def path(self, kind: str, *depends: object) -> Path:
        """Returns the path of the entry of this kind that depends on all of `depends`, which must be JSON values."""
        key = json.dumps([FORMAT, kind, *depends], ensure_ascii=False)
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self.folder / kind / name[:2] / f"{name[2:]}.entry"

    def write(self, path: Path, entry: dict[str, Tensor]) -> None:
        """Writes an entry; the file gets its name once it is complete. Raises UserError if writing fails."""
        content = save({name: value.contiguous().cpu() for name, value in entry.items()})
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(_checksum(content) + content)
            os.replace(draft, path)
        except OSError as error:
            raise UserError(
                f"data.cache: {path} cannot be written ({error.strerror}); make room, or choose another folder"
            ) from None

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """Reads an entry; None if it is missing or damaged."""
        try:
            content = path.read_bytes()
            if content[:CHECKSUM] != _checksum(content[CHECKSUM:]):
                return None
            return load(content[CHECKSUM:])
        except (OSError, SafetensorError):
            return None


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM).digest()


def fingerprint(modules: Iterable[nn.Module], more: object = None, leave_out: tuple[str, ...] = ()) -> str:
    """Hashes the loaded weights of modules: names, types and values, whatever the place and format of their files.

    more: further JSON values to hash; leave_out: tensors whose names contain one of these are not hashed.
    """
    digest = hashlib.blake2b(json.dumps(more).encode(), digest_size=20)
    for module in modules:
        for name, value in module.state_dict().items():
            if not any(part in name for part in leave_out):
                value = value.detach().contiguous().cpu()
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
