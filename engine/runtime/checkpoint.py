"""Checkpoints, from which a run goes on bit for bit: how they are written, checked, found and read.

A checkpoint is a folder run.dir/checkpoints/<iteration> of six digits. It holds what is trained, the optimizer's state
(sharded as ZeRO has it), the generators' states, sums that are not in metrics.jsonl yet, and the iteration, but no
frozen models. The Trainable decides which files its weights have. Whether a run may go on from it, run_folder.py knows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.judge_training import JudgeTrainingConfig
from ..config.settings import dump
from ..config.training import Config
from .digests import digests_of
from .files import sync, writing
from .optimizer import Optimizer
from .ranks import Ranks, on_every

Recipe = Config | JudgeTrainingConfig
CONFIG, STATE, DIGESTS = "config.yaml", "state.json", "digests.json"
NAME, DRAFT = re.compile(r"\d{6}"), re.compile(r"\.\d{6}\.draft")


class Trainable(Protocol):
    """Weights that a run trains, a LoRA or a judge."""

    def save(self, folder: Path, iteration: int) -> None:
        """Writes the weights into a folder, as they are after `iteration` iterations."""

    def load(self, folder: Path) -> None:
        """Reads the weights from a folder that `save` wrote. Raises UserError where they do not fit."""


@dataclass(frozen=True, slots=True)
class Training:
    """All that changes in the course of a run, and hence all that a checkpoint holds."""

    trainable: Trainable
    optimizer: Optimizer
    rngs: Mapping[str, torch.Generator]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint holds beside the training. shared: JSON values, alike on all ranks; own: a rank's tensors."""

    shared: Mapping[str, Any]
    own: Mapping[str, Tensor]


def save(
    training: Training, config: Recipe, iteration: int, ranks: Ranks, facts: Facts, spared: int | None = None
) -> Path:
    """Writes the checkpoint run.dir/checkpoints/<iteration>; returns its path. Every rank calls it.

    It gets its name when all of it is on the disk, so that neither a kill nor a power cut leaves a broken one. Then
    checkpoints beyond `run.keep` are removed, but for that of iteration `spared`. Raises UserError, on every
    rank, if a file cannot be written.
    """
    final = Path(config.run.dir) / "checkpoints" / f"{iteration:06d}"
    draft = final.with_name(f".{final.name}.draft")
    states = {f"generator.{name}": rng.get_state() for name, rng in training.rngs.items()}
    tensors = states | {f"own.{name}": value.cpu() for name, value in facts.own.items()}

    def begin() -> None:
        if ranks.first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def write() -> None:
        training.optimizer.save(draft)
        save_file(tensors, draft / _rank_file(ranks))
        if ranks.first:
            training.trainable.save(draft, iteration)
            dump(config, draft / CONFIG)
            state = {"iteration": iteration, "ranks": ranks.size, **facts.shared}
            (draft / STATE).write_text(json.dumps(state), encoding="utf-8")

    def finish() -> None:
        if ranks.first:
            _seal(draft)
            _remove(final)
            os.replace(draft, final)
            sync(final.parent)
            keep = config.run.keep
            for folder in finished(Path(config.run.dir))[: -keep if keep else 0]:
                if int(folder.name) != spared:
                    _remove(folder)

    def guarded(part: Callable[[], None]) -> None:
        with writing(draft):
            part()

    for part in (begin, write, finish):
        on_every(ranks, partial(guarded, part))
    return final


def restore(training: Training, checkpoint: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Restores weights, optimizer and generators; returns what `save` was given as this rank's own.

    Every rank calls it. Raises UserError, on every rank, if a file cannot be read.
    """
    own = {}

    def read() -> None:
        training.trainable.load(checkpoint)
        training.optimizer.load(checkpoint)
        tensors = load_file(checkpoint / _rank_file(ranks))
        for name, rng in training.rngs.items():
            rng.set_state(tensors[f"generator.{name}"])
        own.update((name.removeprefix("own."), t) for name, t in tensors.items() if name.startswith("own."))

    on_every(ranks, read)
    return own


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Returns the iteration, the number of ranks, and what `save` was given as shared by all ranks."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def finished(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, the newest last, damaged ones too; drafts and other folders are none."""
    folders = (run_dir / "checkpoints").glob("[0-9]*")
    ours = [p for p in folders if NAME.fullmatch(p.name) and any((p / n).is_file() for n in (CONFIG, STATE, DIGESTS))]
    return sorted(ours)


def newest(run_dir: Path) -> Path | None:
    """Returns the checkpoint of the latest iteration, None where there is none."""
    return next(reversed(finished(run_dir)), None)


def last_checkpoint(run_dir: Path) -> str:
    """Names the newest checkpoint of a run, as the end of a sentence."""
    checkpoint = newest(run_dir)
    return f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def damage(checkpoint: Path) -> str:
    """Says what is wrong with a checkpoint, by the digests of its files; nothing if it is whole."""
    try:
        expected = _digests(checkpoint)
    except (OSError, ValueError):
        return f"{DIGESTS} is missing or cannot be read"
    if missing := sorted(name for name in {STATE, CONFIG, *expected} if not (checkpoint / name).is_file()):
        return f"{missing[0]} is missing"
    try:
        found = digests_of(checkpoint / name for name in expected)
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read ({error.strerror})"
    changed = sorted(name for name in expected if found[name] != expected[name])
    if changed or STATE not in expected:
        return f"{[*changed, STATE][0]} is not as it was written"
    iteration = state_of(checkpoint)["iteration"]
    return "" if iteration == int(checkpoint.name) else f"{STATE} is of iteration {iteration}"


def remove_drafts(run_dir: Path) -> None:
    """Removes checkpoints that were not finished."""
    for folder in (run_dir / "checkpoints").glob(".*.draft"):
        if DRAFT.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _rank_file(ranks: Ranks) -> str:
    return f"rank-{ranks.rank}.safetensors"


def _digests(checkpoint: Path) -> dict[str, str]:
    """Reads the digests of a checkpoint's files by name. ValueError where that is not what the file holds."""
    digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
    if not isinstance(digests, dict) or not all(Path(name).name == name for name in digests):
        raise ValueError(f"{DIGESTS} does not hold names and digests")
    return digests


def _seal(draft: Path) -> None:
    """Writes digests of all files, and waits until everything is on the disk."""
    (draft / DIGESTS).write_text(json.dumps(digests_of(sorted(draft.iterdir()))), encoding="utf-8")
    for path in (*draft.iterdir(), draft):
        sync(path)


def _remove(checkpoint: Path) -> None:
    """Removes the files of a checkpoint; if others lie in its folder, or nobody knows which are its own, it is moved
    aside as it is."""
    if not checkpoint.exists():
        return
    try:
        for name in _digests(checkpoint):
            (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / DIGESTS).unlink()
        checkpoint.rmdir()
    except (OSError, ValueError):
        os.replace(checkpoint, _free(checkpoint))


def _free(checkpoint: Path) -> Path:
    """Returns a name that is not in use: 000010.old, 000010.old1 and so on."""
    names = (checkpoint.with_name(f"{checkpoint.name}.old{number or ''}") for number in count())
    return next(name for name in names if not name.exists())
