"""Digests of files: of a checkpoint's, which must be whole, and of what a run reads, which must stay what it was.

Models and pairs take gigabytes, so of a large file only samples are read (`input_digest`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 1 << 22  # bytes read at once
WHOLE = 1 << 26  # bytes up to which an input file is read whole
SAMPLE = 1 << 12  # bytes of each sample of a larger one
SAMPLES = 4096  # of a file whose tensors are not known
INPUT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".parquet"}


def digests_of(files: Iterable[Path]) -> dict[str, str]:
    """Returns the SHA-256 of whole files by their names, several at a time."""
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of Python's lock
        return dict(zip((file.name for file in files), pool.map(_sha256, files), strict=True))


def input_digests(path: Path) -> dict[str, str]:
    """Returns digests of the files that `path` means, by their names in it; {} if there are none.

    path: a file; a folder, of which files of weights, configurations, vocabularies and parquet count; or a pattern such
    as folder/train-*.parquet. A single file counts under an empty name, so that a copy may be called otherwise.
    """
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.suffix in INPUT_SUFFIXES}
    elif "*" in path.name:
        files = {file.name: file for file in path.parent.glob(path.name)}
    else:
        files = {"": path}
    return {name: input_digest(file) for name, file in sorted(files.items()) if file.is_file()}


def input_digest(file: Path) -> str:
    """Returns a SHA-256 of the size and content of a file, whatever its path and date.

    Up to 64 MiB it is of the whole content. Of a larger safetensors file it is of the header and the middle 4 KiB of
    every tensor, of any other of 4,096 samples of 4 KiB in even distances: another training, another merge or another
    type of the weights shows in it, a few bytes that were changed elsewhere need not.
    """
    size = file.stat().st_size
    if size <= WHOLE:
        return _sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in _tensor_samples(file) or range(0, size, size // SAMPLES):
            opened.seek(start)
            digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _tensor_samples(file: Path) -> list[int]:
    """Returns where samples of a safetensors file begin: its whole header, the middle of each tensor; else nothing."""
    if file.suffix != ".safetensors":
        return []
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length) if length < file.stat().st_size else b"")
        except ValueError:
            return []
    header.pop("__metadata__", None)
    return [*range(0, 8 + length, SAMPLE), *_middles(header.values(), 8 + length)]


def _middles(tensors: Iterable[dict], begin: int) -> Iterator[int]:
    """Yields where the middle sample of each tensor lies, of tensors as a safetensors header describes them."""
    for tensor in tensors:
        first, last = tensor["data_offsets"]
        yield begin + max(first, (first + last - SAMPLE) // 2)
