"""Reads files of JSON lines, of which every reader says alike what is wrong and in which line.

pair_files.py does not read by it: a broken row there is listed, and ends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError, one_line, short
from ..user_files import parse_json, read_text


def parsed(text: str, where: str) -> Iterator[tuple[int, object]]:
    """Yields the number (from 1) and the value of every line that is not empty. UserError names `where` and the line.

    Only \\n ends a line: others that Unicode has, such as U+2028, may stand in a JSON text.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise UserError(f"{where}: line {number} is not JSON ({one_line(error)})") from None


def read_objects(path: Path, where: str, expected: str) -> list[tuple[int, dict]]:
    """Returns the number and the object of each line of a file. UserError begins with `where`, and says the line.

    where: the file, after the key that names it if there is one. expected: what the lines should be.
    """
    try:
        rows = list(parsed(read_text(path), where))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({one_line(error)}); expected {expected}") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number}: found {short(row)}, expected an object: {expected}")
    if not rows:
        raise UserError(f"{where}: found no lines, expected {expected}")
    return rows
