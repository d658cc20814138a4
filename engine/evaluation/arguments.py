"""What a command line asks to be evaluated, checked as far as that goes without torch and without reading weights."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from ..config.training import Device, Dtype
from ..errors import UserError
from ..scorers.names import NAMES as SCORERS
from ..user_files import user_path
from .protocols import GENEVAL
from .protocols import NAMES as PROTOCOLS

BASE = "base"
NAME = re.compile(r"[\w.+-]{1,40}")
LORA_FOLDERS = ("lora", "unet")  # folders whose name says nothing
MOST = 10_000  # images of a prompt, and of a batch
DTYPES, DEVICES = get_args(Dtype), get_args(Device)


class Source(NamedTuple):
    """A system as it was named: the name that tables give it, and a path or a hub id."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Request:
    """The checked arguments; None is what was not said. strengths: factors of each LoRA, () for 1 without saying so."""

    sources: tuple[Source, ...]
    out: Path
    base: str | None
    components: str | None
    prompts: str | None
    scorers: tuple[str, ...] | None
    protocol: str
    seeds: int | None
    strengths: tuple[float, ...]
    dtype: str
    batch: int
    device: str
    published: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """Checks the words of a command line. Raises UserError that names the argument."""
        sources = tuple(_source(word) for word in args.systems)
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1 or name == BASE:
                why = "which is what the base is called" if name == BASE else "twice"
                raise UserError(f"found the name {name}, {why}; NAME=PATH gives a system another name")
        one_of("--protocol", args.protocol, PROTOCOLS)
        one_of("--dtype", args.dtype, DTYPES)
        one_of("--device", args.device, DEVICES)
        for name in ("seeds", "batch"):
            value = getattr(args, name)
            if value is not None and not 1 <= value <= MOST:
                raise UserError(f"--{name}: found {value}, expected a number from 1 to {MOST:,}")
        if args.prompts is None and args.protocol == GENEVAL.name:
            raise UserError(
                "--protocol: geneval draws GenEval's prompts; --prompts names its evaluation_metadata.jsonl"
            )
        if args.prompts is not None and not user_path(args.prompts).is_file():
            raise UserError(
                f"--prompts: found no file {args.prompts}, expected a file of prompts (.txt, .json, .jsonl, .csv)"
            )
        scorers = None if args.scorers is None else scorers_of(args.scorers)
        fields = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        return cls(**fields | {"scorers": scorers, "strengths": _strengths(args.strength), "sources": sources})


def _source(word: str) -> Source:
    """Reads NAME=PATH or PATH; a name that a file or folder does not say is that of the folder above.

    A hub id of a model needs a name, so that a folder that is mistyped is not looked for on the hub.
    """
    name, equals, path = word.partition("=")
    if not equals:
        path, name = word, ""
    local = user_path(path)
    if not local.exists() and not (equals and re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        raise UserError(f"{path}: found no such file or folder, expected a run, a LoRA or a model; or NAME=PATH")
    if not name:
        at = local.resolve()
        while at.stem in (*LORA_FOLDERS, "pytorch_lora_weights", "checkpoints") or at.name.isdigit():
            at = at.parent
        name = re.sub(r"[^\w.+-]", "_", at.stem if at.suffix == ".safetensors" else at.name)[:40]
    if not NAME.fullmatch(name):
        raise UserError(f"found the name {name!r}, expected letters, digits and . _ + -, at most 40")
    return Source(name, path)


def scorers_of(words: str) -> tuple[str, ...]:
    """Reads the scorers of an option --scorers, with commas between them. Raises UserError for one that is unknown."""
    specs = tuple(dict.fromkeys(filter(None, (word.strip() for word in words.split(",")))))
    names = [spec.partition("=")[0] for spec in specs]
    for name, spec in zip(names, specs, strict=True):
        if names.count(name) > 1:
            raise UserError(f"--scorers: found {name} twice, expected each once")
        if name not in SCORERS and ":" not in spec:
            one_of("--scorers", name, (*SCORERS, "module:factory"))
    if not specs:
        raise UserError(f"--scorers: found none, expected one or more of {', '.join(SCORERS)} or module:factory")
    return specs


def _strengths(words: str | None) -> tuple[float, ...]:
    if words is None:
        return ()
    try:
        strengths = tuple(dict.fromkeys(float(word) for word in words.split(",")))
    except ValueError:
        strengths = ()
    if not strengths or not all(map(math.isfinite, strengths)):
        raise UserError(f"--strength: found {words!r}, expected one or more numbers, such as 0.5,1.0")
    return strengths


def one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError, with the key, for a value that is not among the known ones."""
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{key}: found {value!r}, expected one of {', '.join(known)}{hint}")
