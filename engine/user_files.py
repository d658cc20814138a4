"""Reads files that a user names, so that none can hold a run up or fill its memory, and the paths and JSON in them.

What a file holds is checked by its readers.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MOST_TEXT = 2**27  # bytes of a file of text
HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def user_path(text: str) -> Path:
    """Returns the path that a person writes on a command line, where ~ is the home folder."""
    return Path(text).expanduser()


def public_name(text: str) -> str:
    """Returns a hub id or other word as it is, and of a path of this machine its last name: what may be published."""
    path = Path(text).expanduser()
    return Path(os.path.abspath(path)).name if text and (path.is_absolute() or path.exists()) else text


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Reads a regular file of at most `most` bytes. Raises OSError for a pipe, a device, and whatever is larger."""
    state = path.stat()
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, expected a regular file", str(path))
    if state.st_size > most:
        raise OSError(errno.EFBIG, f"has {state.st_size:,} bytes, more than {most:,}", str(path))
    with path.open("rb") as file:
        return file.read(most)


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Reads UTF-8 text, with or without a byte order mark; every line of it ends with a line feed alone.

    Raises OSError as read_bytes does, and UnicodeDecodeError.
    """
    return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError, also for a number of thousands of digits and for brackets nested as deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can hold: half of a surrogate pair, which JSON can name, is none."""
    return isinstance(value, str) and (value.isascii() or HALF_CHARACTER.search(value) is None)
