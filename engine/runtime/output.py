"""Where results go: which places are free, text files that are there whole or not at all, and tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from .files import write_atomically


def check_free(key: str, path: Path | None, mark: str = "") -> None:
    """Raises UserError, with the key, if anything is at a place that an output would take.

    Free are None, a new place, and an empty folder. mark: text in the first 80 characters of one's own files, which are
    made anew; a folder is then not free.
    """
    if path is None or not path.exists() or (not mark and path.is_dir() and not any(path.iterdir())):
        return
    with suppress(OSError, ValueError):
        if mark and mark in path.read_text(encoding="utf-8")[:80]:
            return
    raise UserError(f"{key}: {path} exists already and is not overwritten; choose another place")


def write_all(texts: Mapping[Path | None, str]) -> None:
    """Writes text files, whose folders are made; None is a file nobody asked for. UserError names one that fails."""
    wanted = {path: text for path, text in texts.items() if path is not None}
    try:
        for path, text in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines of aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    padded = lambda row: [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *padded(row)]).rstrip() for row in (titles, *rows)]
