"""Reads prompt files and orders prompts. The seed alone decides the order, so resuming needs no state."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import UserError, short
from ..user_files import is_text, parse_json, read_text, user_path
from .json_lines import parsed

FORMS = (
    "a JSON list of {caption: ...}, JSON lines of the same (.jsonl), a table with a column prompt or caption (.csv, "
    ".tsv), or text with one prompt a line"
)
NAMES = ("caption", "prompt")  # of the text in an entry


def read_prompts(path: str, key: str) -> list[str]:
    """Reads the prompts of a .json, .jsonl, .csv, .tsv or text file; skips empty ones.

    An entry of .json or .jsonl is an object with `caption` or `prompt`, or the text alone. Only a line feed or a
    carriage return ends a line. Raises UserError naming key and entry.
    """
    try:
        text = read_text(user_path(path))
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror}); expected {FORMS}") from None
    except ValueError:
        raise UserError(f"{key}: {path} is not UTF-8 text; expected {FORMS}") from None
    readers = {".json": _json_list, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table}
    read = readers.get(Path(path).suffix.lower(), _lines)
    prompts = [prompt.strip() for prompt in read(text, f"{key}: {path}") if prompt.strip()]
    if not prompts:
        raise UserError(f"{key}: {path} holds no prompt; expected {FORMS}")
    return prompts


def split_prompts(prompts: list[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Splits prompts into training prompts and `count` held-out ones drawn by the seed, with none in common."""
    unique = list(dict.fromkeys(prompts))
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    heldout = [unique[place] for place in order[:count]]
    excluded = set(heldout)
    return [prompt for prompt in prompts if prompt not in excluded], heldout


def first_used(prompts: list[str], count: int, seed: int, multiple: int) -> list[str]:
    """Returns the distinct prompts among the first `count` that a run draws, in the order of their first use.

    Later prompts are added until their number is a multiple of `multiple`, so that a longer run has the same prompts in
    groups of that size.
    """
    order = batch_of(prompts, 0, len(prompts), seed) if prompts else []
    used = len(dict.fromkeys(order[:count]))
    return list(dict.fromkeys(order))[: -(-used // multiple) * multiple]


def batch_of(prompts: list[str], iteration: int, size: int, seed: int) -> list[str]:
    """Returns the `size` prompts of an iteration (from 0); each epoch is one permutation drawn from seed and epoch."""
    first, beyond = iteration * size, (iteration + 1) * size
    epochs = range(first // len(prompts), (beyond - 1) // len(prompts) + 1)
    generators = [torch.Generator().manual_seed(seed * 100_003 + epoch) for epoch in epochs]
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for generator in generators])
    begin = first - epochs[0] * len(prompts)
    return [prompts[place] for place in order[begin : begin + size].tolist()]


def _lines(text: str, where: str) -> Iterator[str]:
    """Yields the lines of a text, which must not be JSON by another name."""
    for part, name in ((text, ".json"), (text.strip().partition("\n")[0], ".jsonl")):
        with contextlib.suppress(ValueError):
            if isinstance(parse_json(part), list | dict):
                raise UserError(f"{where} holds JSON, expected text with one prompt a line; give it a name in {name}")
    return iter(text.split("\n"))


def _table(text: str, where: str) -> Iterator[str]:
    """Yields the column `caption` or `prompt` of a table whose first line names the columns, after a tab in a .tsv."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if where.lower().endswith(".tsv") else ",")
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        columns = [header.index(name) for name in NAMES if name in header]
        if len(columns) != 1 or header.count(header[columns[0]]) > 1:
            raise UserError(
                f"{where}: found the columns {short(', '.join(header))}, expected one that is called prompt or caption"
            )
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{where}: line {rows.line_num} has {len(row)} cells, expected the {len(header)} of the first "
                    "line; put a text with a comma in quotes"
                )
            yield row[columns[0]] if row else ""
    except csv.Error as error:
        raise UserError(f"{where}: line {rows.line_num} is no row of a table ({error})") from None


def _json_list(text: str, where: str) -> Iterator[str]:
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); expected a list of {{caption: ...}}") from None
    if not isinstance(entries, list):
        raise UserError(f"{where}: found a JSON {type(entries).__name__}, expected a list of {{caption: ...}}")
    for number, entry in enumerate(entries, 1):
        yield _caption(entry, f"{where}: entry {number}")


def _json_lines(text: str, where: str) -> Iterator[str]:
    return (_caption(entry, f"{where}: line {number}") for number, entry in parsed(text, where))


def _caption(entry: object, where: str) -> str:
    texts = [entry] if isinstance(entry, str) else []
    if isinstance(entry, dict):
        texts = [entry[name] for name in NAMES if isinstance(entry.get(name), str)]
    if texts and not is_text(texts[0]):
        raise UserError(f"{where}: found {short(texts[0])}, expected text without half characters (lone surrogates)")
    if texts:
        return texts[0]
    contents = f"keys {', '.join(map(str, entry))[:80]}" if isinstance(entry, dict) and entry else short(entry)
    raise UserError(f"{where} has no caption; found {contents}, expected {{caption: text}}")
