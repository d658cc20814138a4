"""Trackers: where people watch a run beside metrics.jsonl, in TensorBoard, in Weights & Biases, or nowhere.

A tracker gets the record of each logged iteration as scalars; metrics.jsonl stays what resuming and reports read.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError, one_line, warn


class Tracker(Protocol):
    """Where the records of a run are shown while it goes on."""

    def write(self, record: dict) -> None:
        """Shows a record that `Metrics.flush` returned."""

    def close(self) -> None:
        """Sends what is left. Nothing can be written afterwards."""


class TensorBoard:
    """Event files in run_dir/tensorboard. Points after iteration `start`, of a run cut short there, are purged."""

    def __init__(self, run_dir: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed on the other ranks

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)

    def write(self, record: dict) -> None:
        """Writes a point of each scalar at record["iteration"], and flushes."""
        for tag, number in scalars(record):
            self._writer.add_scalar(tag, number, record["iteration"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, of project WANDB_PROJECT or "strop", with its files in run_dir/wandb.

    It is sent where wandb has a login and reaches its server, and else stays on disk until `wandb sync`; WANDB_MODE
    decides otherwise. A resumed run goes on under the id in run_dir/wandb/strop-id.txt, drawn over iterations.
    """

    def __init__(self, run_dir: Path, recipe: dict[str, Any]):
        import wandb  # an extra

        id_file = run_dir / "wandb" / "strop-id.txt"
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")

        def begin(mode: str | None) -> wandb.Run:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", "strop"),
                name=run_dir.resolve().name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_dir),
                config=recipe,
                mode=mode,
                settings=wandb.Settings(console="off", silent=True),
            )

        try:
            reaches_server = "WANDB_MODE" in os.environ or wandb.login(prompt=False)
            self._run = begin(None if reaches_server else "offline")
            reason = "has no login here"
        except wandb.Error as error:
            reaches_server, reason = False, f"did not start ({one_line(error)})"
            self._run = begin("offline")
        if not reaches_server:
            warn(f"run.tracker: wandb {reason}; the run stays on disk until `wandb sync {run_dir}/wandb/offline-*`")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, record: dict) -> None:
        """Logs each scalar, and the iteration to draw it at."""
        self._run.log(dict(scalars(record)) | {"iteration": record["iteration"]})

    def close(self) -> None:
        """Ends the run, which sends what is left."""
        self._run.finish()


def check_tracker(kind: str) -> None:
    """Raises UserError where the package of run.tracker is not installed."""
    if kind == "wandb" and find_spec("wandb") is None:
        raise UserError(
            "run.tracker: found wandb, but its package is not installed; `pip install 'strop[wandb]'` installs it, or "
            "choose tensorboard or none"
        )


def open_tracker(kind: str, run_dir: Path, start: int, recipe: dict[str, Any]) -> Tracker | None:
    """Returns the tracker that run.tracker names, None for none. Only one rank may open one.

    start: iterations already done. recipe: the resolved recipe, which Weights & Biases shows beside the curves.
    """
    if kind == "tensorboard":
        return TensorBoard(run_dir, start)
    return WandB(run_dir, recipe) if kind == "wandb" else None


def scalars(record: dict) -> Iterator[tuple[str, float]]:
    """Yields (tag, number) of what was measured: "train/loss", "seconds/rollout", "pairs_per_t/751"."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", item) for key, item in value.items() if item is not None)
        elif isinstance(value, int | float) and name != "iteration":
            yield f"train/{name}", value
