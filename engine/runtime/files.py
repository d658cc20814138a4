"""Writes files of a run so that they outlast a kill and a power cut, and says in a sentence why one cannot be written.

What the files hold is up to their callers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError

# What a person has to put right: a full disk, a quota, a file system without write access, a limit, a broken disk.
REASONS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Opens a context whose errors of the file system are UserErrors; they name the file, or `path` if none is known.

    Errors that nobody can put right by making room or giving access pass as they are.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in REASONS:
            raise
        raise UserError(
            f"{getattr(error, 'filename', None) or path}: {os.strerror(number)}; the run ends here, and when that is "
            "put right, run.resume=auto goes on from its newest checkpoint"
        ) from None


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader, also after a kill, sees either the old content or the new."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def _number(error: OSError | SafetensorError) -> int | None:
    """Returns the error's errno; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named[1]) if named else None
