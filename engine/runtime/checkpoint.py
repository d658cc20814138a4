"""The run folder: opened without overwriting anything, and checkpoints from which a run goes on bit for bit.

A checkpoint holds what is trained, the optimizer state (sharded as ZeRO has it), the generators' states and the
iteration, but no frozen models. The Trainable decides which files its weights have.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ..config.judge_training import JudgeTrainingConfig
from ..config.settings import differences, dump
from ..config.training import Config, load
from ..errors import UserError
from .optimizer import Optimizer
from .ranks import Ranks

Recipe = Config | JudgeTrainingConfig
MAY_CHANGE = (  # on resume; everything else decides what the run computes
    "run.dir",
    "run.iterations",
    "run.device",
    "run.kernels",
    "run.log_every",
    "run.tracker",
    "run.save_every",
    "run.resume",
    "run.rank_timeout",
    "run.share_of_peak",
    "evaluate.prompts",
    "evaluate.num_steps",
    "evaluate.guidance",
    "evaluate.batch",
    "evaluate.seed",
    "evaluate.pictures",
    "evaluate.scorers",
    "evaluate.every",
    "evaluate.watched",
    "evaluate.patience",
    "evaluate.stop",
    "data.cache",
    "data.workers",
    "data.max_broken",
)


class Trainable(Protocol):
    """Weights that a run trains, a LoRA or a judge. keep: how many checkpoints stay in a run folder; None keeps all."""

    keep: int | None

    def save(self, folder: Path, iteration: int) -> None:
        """Writes the weights into a folder, as they are after `iteration` iterations."""

    def load(self, folder: Path) -> None:
        """Reads the weights from a folder that `save` wrote. Raises as `check` does."""

    def check(self, folder: Path) -> None:
        """Raises UserError where the weights in the folder do not fit; changes nothing."""


@dataclass(frozen=True, slots=True)
class Training:
    """All that changes in the course of a run, and hence all that a checkpoint holds."""

    trainable: Trainable
    optimizer: Optimizer
    rngs: Mapping[str, torch.Generator]


def check_run(config: Recipe, ranks: Ranks) -> None:
    """Raises the UserErrors of `open_run` that need no trainable, early and without writing anything."""
    _on_first(ranks, lambda: _check(config, ranks))


def open_run(config: Recipe, ranks: Ranks, trainable: Trainable) -> Path | None:
    """Makes the run folder, writes config.yaml, and returns the checkpoint to go on from, or None for a new run.

    Raises UserError, on every rank and before anything is written, for a folder that holds something, cannot be
    written, or does not fit run.resume and the trainable.
    """
    return _on_first(ranks, lambda: _open(config, ranks, trainable))


def save(training: Training, config: Recipe, iteration: int, ranks: Ranks, spent: Mapping[str, Any]) -> Path:
    """Writes the checkpoint run.dir/checkpoints/<iteration>, which gets its name when it is complete; returns its path.

    spent: seconds and the ledger's totals so far, for `spent_before`. Checkpoints beyond `Trainable.keep` are removed.
    Every rank calls it.
    """
    final = Path(config.run.dir) / "checkpoints" / f"{iteration:06d}"
    draft = final.with_name(f".{final.name}.draft")
    if ranks.first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    _wait(ranks)
    training.optimizer.save(draft)
    states = {name: rng.get_state() for name, rng in training.rngs.items()}
    save_file(states, draft / f"generators-{ranks.rank}.safetensors")
    if ranks.first:
        training.trainable.save(draft, iteration)
        dump(config, draft / "config.yaml")
        (draft / "state.json").write_text(json.dumps({"iteration": iteration, "ranks": ranks.size, **spent}))
    _wait(ranks)
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        keep = training.trainable.keep
        for folder in _finished(Path(config.run.dir))[: -keep if keep else 0]:
            shutil.rmtree(folder, ignore_errors=True)
    _wait(ranks)
    return final


def restore(training: Training, checkpoint: Path, ranks: Ranks) -> int:
    """Restores the weights, the optimizer and the generators of a checkpoint; returns how many iterations were done."""
    training.trainable.load(checkpoint)
    training.optimizer.load(checkpoint)
    states = load_file(checkpoint / f"generators-{ranks.rank}.safetensors")
    for name, rng in training.rngs.items():
        rng.set_state(states[name])
    return _state(checkpoint)["iteration"]


def spent_before(checkpoint: Path | None, name: str) -> dict[str, Any]:
    """Returns the entry of `spent` that `save` wrote under this name, {} for a new run."""
    return _state(checkpoint).get(name, {}) if checkpoint else {}


def newest(run_dir: Path) -> Path | None:
    """Returns the checkpoint of the latest iteration, None where there is none; unfinished ones do not count."""
    return next(reversed(_finished(run_dir)), None)


def _on_first(ranks: Ranks, action: Callable[[], Path | None]) -> Path | None:
    """Calls the action on the first rank; every rank returns its result, or raises its UserError."""
    outcome: list = [None, None]  # result, error
    if ranks.first:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if ranks.size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def _open(config: Recipe, ranks: Ranks, trainable: Trainable) -> Path | None:
    checkpoint = _check(config, ranks)
    if checkpoint:
        trainable.check(checkpoint)
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        dump(config, run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: {run_dir} cannot be written ({error.strerror}); choose another folder") from None
    return checkpoint


def _check(config: Recipe, ranks: Ranks) -> Path | None:
    """Returns the checkpoint to go on from, or None for a new run, whose folder must be new or empty."""
    run_dir = Path(config.run.dir)
    if config.run.resume:
        return _checkpoint_to_resume(config, run_dir, ranks)
    try:
        holds_files = run_dir.exists() and any(run_dir.iterdir())
    except OSError as error:
        raise UserError(f"run.dir: {run_dir} cannot be used ({error.strerror}); choose another folder") from None
    if holds_files:
        raise UserError(
            f"run.dir: {run_dir} is not empty; choose a new folder, or run.resume=true to go on with the run in it"
        )
    return None


def _checkpoint_to_resume(config: Recipe, run_dir: Path, ranks: Ranks) -> Path:
    checkpoint = newest(run_dir)
    if checkpoint is None:
        raise UserError(f"run.resume: {run_dir} holds no checkpoint; leave run.resume out to begin a run there")
    split = isinstance(config, Config) and not config.prompts.heldout  # which evaluate.prompts then decides
    may_change = [key for key in MAY_CHANGE if not (split and key == "evaluate.prompts")]
    changed = differences(load(checkpoint / "config.yaml", cls=type(config)), config, may_change)
    if changed:
        raise UserError(
            f"run.resume: {checkpoint} belongs to another configuration ({'; '.join(changed)}); "
            "set these keys back or begin a new run"
        )
    size = _state(checkpoint)["ranks"]
    if size != ranks.size:
        raise UserError(
            f"run.resume: found {ranks.size} processes, expected {size}, as {checkpoint} was written by; start {size}"
        )
    return checkpoint


def _finished(run_dir: Path) -> list[Path]:
    return sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if (p / "state.json").is_file())


def _state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def _wait(ranks: Ranks) -> None:
    if ranks.size > 1:
        dist.barrier()
