"""What is computed once from preference pairs and frozen models, and kept on disk from run to run.

An entry is a small file, safetensors behind a checksum, whose name is a hash of everything that it depends on, so that
nothing is ever out of date: a changed model, resolution, image or caption looks for another name. What becomes of an
entry that is missing or damaged is decided by pair_survey.py, which makes it anew. Nothing is ever deleted here.
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

FORMAT = 1  # of the entries; another number finds none of the old ones
CHECKSUM = 16  # bytes in front of an entry


class PairCache:
    """A folder of entries, which several processes and runs may share."""

    def __init__(self, folder: Path):
        """Makes the folder. Raises UserError where it cannot be written."""
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
        """Where the entry of this kind lies that depends on all of `depends`, which JSON can express."""
        said = json.dumps([FORMAT, kind, *depends], ensure_ascii=False)
        name = hashlib.blake2b(said.encode(), digest_size=20).hexdigest()
        return self.folder / kind / name[:2] / f"{name[2:]}.entry"

    def write(self, path: Path, entry: dict[str, Tensor]) -> None:
        """Keeps an entry; it gets its name when it is whole. Raises UserError where the disk does not take it."""
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
        """The entry, or None where there is none or where it is not what was written."""
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
    """A hash of the weights of some modules as they are loaded: names, types and values.

    It does not depend on where the files lie, nor on their form. more: what else decides, as JSON can
    express it; leave_out: parts of names of tensors that do not.
    """
    found = hashlib.blake2b(json.dumps(more).encode(), digest_size=20)
    for module in modules:
        for name, value in module.state_dict().items():
            if not any(part in name for part in leave_out):
                value = value.detach().contiguous().cpu()
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
