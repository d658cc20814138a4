"""Reads prompt files and orders prompts. The seed alone decides the order, so resuming needs no state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import UserError
from .json_lines import parsed

FORMS = "a JSON list of {caption: ...}, JSON lines of the same (.jsonl), or text with one prompt a line"


def read_prompts(path: str, key: str) -> list[str]:
    """Reads the prompts of a .json, .jsonl or text file; skips empty ones. Raises UserError naming key and entry.

    An entry of .json or .jsonl is an object with `caption` or `prompt`, or the text alone.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror}); expected {FORMS}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is not UTF-8 text; expected {FORMS}") from None
    readers = {".json": _json_list, ".jsonl": _json_lines}
    read = readers.get(Path(path).suffix.lower(), lambda text, where: iter(text.splitlines()))
    prompts = [prompt.strip() for prompt in read(text.removeprefix("\ufeff"), f"{key}: {path}") if prompt.strip()]
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
    order = batch_of(prompts, 0, len(prompts), seed)
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


def _json_list(text: str, where: str) -> Iterator[str]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); expected a list of {{caption: ...}}") from None
    if not isinstance(entries, list):
        raise UserError(f"{where}: found a JSON {type(entries).__name__}, expected a list of {{caption: ...}}")
    for number, entry in enumerate(entries, 1):
        yield _caption(entry, f"{where}: entry {number}")


def _json_lines(text: str, where: str) -> Iterator[str]:
    return (_caption(entry, f"{where}: line {number}") for number, entry in parsed(text, where))


def _caption(entry: object, where: str) -> str:
    if isinstance(entry, str):
        return entry
    for name in ("caption", "prompt"):
        if isinstance(entry, dict) and isinstance(entry.get(name), str):
            return entry[name]
    contents = f"keys {', '.join(map(str, entry))}" if isinstance(entry, dict) and entry else repr(entry)[:80]
    raise UserError(f"{where} has no caption; found {contents}, expected {{caption: text}}")
