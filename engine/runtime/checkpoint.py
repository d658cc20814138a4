"""The run folder: opened without overwriting anything, and checkpoints from which a run goes on bit for bit.

A checkpoint holds what is trained (a LoRA or a judge), the optimizer state (sharded as ZeRO has it), the generators'
states and the iteration. The frozen base model is not in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ..config.judge_training import SpmConfig
from ..config.settings import differences, dump
from ..config.training import Config, load
from ..errors import UserError
from .optimizer import LocalAdamW, ZeroAdamW
from .ranks import Ranks

MAY_CHANGE = (  # on resume; everything else decides what the run computes
    "run.dir",
    "run.iterations",
    "run.device",
    "run.kernels",
    "run.log_every",
    "run.save_every",
    "run.resume",
    "run.share_of_peak",
    "evaluate.prompts",
    "evaluate.num_steps",
    "evaluate.guidance",
    "evaluate.batch",
    "evaluate.seed",
    "evaluate.pictures",
    "evaluate.examiner",
    "data.cache",
    "data.workers",
    "data.max_broken",
)


def check_run(config: Config | SpmConfig, ranks: Ranks) -> None:
    """All that `open_run` complains of itself, early and without writing anything."""
    _on_first(ranks, lambda: _check(config, ranks))


def open_run(config: Config | SpmConfig, ranks: Ranks, check: Callable[[Path], object] | None = None) -> Path | None:
    """Makes the run folder, writes config.yaml, and returns the checkpoint to go on from, or None for a new run.

    Raises UserError, on every rank and before anything is written, for a folder that holds something, cannot be
    written, or does not fit run.resume; and what `check` raises for the checkpoint.
    """
    return _on_first(ranks, lambda: _open(config, ranks, check))


def _on_first(ranks: Ranks, action: Callable[[], Path | None]) -> Path | None:
    """The first rank acts; every rank returns what it returned, or raises the UserError that it raised."""
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


def _open(config: Config | SpmConfig, ranks: Ranks, check: Callable[[Path], object] | None) -> Path | None:
    checkpoint = _check(config, ranks)
    if checkpoint and check:
        check(checkpoint)
    _write_config(config)
    return checkpoint


def _check(config: Config | SpmConfig, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from; None for a new run, whose folder is new or empty."""
    run_dir = Path(config.run.dir)
    if config.run.resume:
        return _checkpoint_to_resume(config, run_dir, ranks)
    try:
        taken = run_dir.exists() and any(run_dir.iterdir())
    except OSError as error:
        raise UserError(f"run.dir: {run_dir} cannot be used ({error.strerror}); choose another folder") from None
    if taken:
        raise UserError(
            f"run.dir: {run_dir} is not empty; choose a new folder, or run.resume=true to go on with the run in it"
        )
    return None


def _write_config(config: Config | SpmConfig) -> None:
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        dump(config, run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: {run_dir} cannot be written ({error.strerror}); choose another folder") from None


def _checkpoint_to_resume(config: Config | SpmConfig, run_dir: Path, ranks: Ranks) -> Path:
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
            f"run.resume: {checkpoint} was written by {size} processes, found {ranks.size}; start as many as then"
        )
    return checkpoint


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of the latest iteration; unfinished ones do not count."""
    return next(reversed(_finished(run_dir)), None)


def _finished(run_dir: Path) -> list[Path]:
    return sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if (p / "state.json").is_file())


def save(
    write: Callable[[Path], object],
    config: Config | SpmConfig,
    iteration: int,
    optimizer: LocalAdamW | ZeroAdamW,
    rngs: dict[str, torch.Generator],
    ranks: Ranks,
    seconds: dict[str, float],
    ledger: dict[str, list[float]],
    keep: int | None = None,
) -> Path:
    """Writes run.dir/checkpoints/<iteration>; it gets its name when it is complete. Every rank calls it.

    write: puts what is trained into a folder, on the first rank. seconds: by stage, of the run so far. ledger: its
    totals. keep: how many checkpoints may stay; older ones are removed.
    """
    final = Path(config.run.dir) / "checkpoints" / f"{iteration:06d}"
    draft = final.with_name(f".{final.name}.draft")
    if ranks.first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    _wait(ranks)
    optimizer.save(draft)
    save_file({name: rng.get_state() for name, rng in rngs.items()}, draft / f"generators-{ranks.rank}.safetensors")
    if ranks.first:
        write(draft)
        dump(config, draft / "config.yaml")
        state = {"iteration": iteration, "ranks": ranks.size, "seconds": seconds, "ledger": ledger}
        (draft / "state.json").write_text(json.dumps(state))
    _wait(ranks)
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        for old in _finished(Path(config.run.dir))[: -keep if keep else 0]:
            shutil.rmtree(old, ignore_errors=True)
    _wait(ranks)
    return final


def restore(
    read: Callable[[Path], object],
    checkpoint: Path,
    optimizer: LocalAdamW | ZeroAdamW,
    rngs: dict[str, torch.Generator],
    ranks: Ranks,
) -> int:
    """Puts everything back as `save` found it, what is trained by `read`; returns the number of iterations done."""
    read(checkpoint)
    optimizer.load(checkpoint)
    states = load_file(checkpoint / f"generators-{ranks.rank}.safetensors")
    for name, rng in rngs.items():
        rng.set_state(states[name])
    return _state(checkpoint)["iteration"]


def seconds_before(checkpoint: Path | None) -> dict[str, float]:
    """Seconds by stage that the run had taken when this checkpoint was written; none for a new run."""
    return _state(checkpoint)["seconds"] if checkpoint else {}


def ledger_before(checkpoint: Path | None) -> dict[str, list[float]]:
    """The ledger's totals when this checkpoint was written; none for a new run."""
    return _state(checkpoint).get("ledger", {}) if checkpoint else {}


def _state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def _wait(ranks: Ranks) -> None:
    if ranks.size > 1:
        dist.barrier()
