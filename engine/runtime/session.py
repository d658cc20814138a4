"""A session: all that a run has beside its method, from the run folder to the ledger.

It joins the processes, opens the run folder, keeps the clock, the ledger and the metrics, writes records and
checkpoints when they are due, and goes on from a checkpoint. A method (methods/) says what an iteration does; the loop
over iterations is in methods/loop.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...kernels import use_reference
from . import checkpoint, ledger
from .checkpoint import Recipe, Training
from .columns import Column
from .ledger import Ledger
from .metrics import Metrics, Value, read_records
from .progress import LiveLine, Progress
from .ranks import Ranks, start
from .stopwatch import Stopwatch
from .tracker import Tracker, check_tracker, open_tracker


class Session:
    """Holds one process's part of a run: `with Session.start(config) as session:`, then `open`, `begin` and the loop.

    metrics, training and progress exist from `begin` on. live: the line of the terminal that moves within an iteration.
    """

    metrics: Metrics
    training: Training
    progress: Progress

    def __init__(self, config: Recipe, ranks: Ranks):
        self.config, self.run, self.ranks = config, config.run, ranks
        self.dir = Path(config.run.dir)
        self.clock = Stopwatch(ranks.device)
        self.ledger = Ledger(ranks.device)
        self.live = LiveLine(ranks.first)
        self.tracker: Tracker | None = None  # on the first rank, from `begin` on
        self.done = 0  # iterations
        self._begun = time.perf_counter()
        self._resumed: Path | None = None
        self._seconds_before: dict[str, float] = {}
        self._collecting = ""  # the stage whose seconds, with those of the update, are a method's work

    @classmethod
    @contextmanager
    def start(cls, config: Recipe) -> Iterator[Session]:
        """Joins the processes of the run and checks its folder, writing nothing. Raises UserError as `check_run`."""
        check_tracker(config.run.tracker)
        use_reference(config.run.kernels == "reference")
        session = cls(config, start(config.run.device))
        checkpoint.check_run(config, session.ranks)
        with session.ledger:
            try:
                yield session
            finally:
                session.live.erase()
                if session.tracker:
                    session.tracker.close()

    def open(self, trainable: checkpoint.Trainable) -> None:
        """Makes the run folder, or finds the checkpoint to go on from. Raises UserError before anything is written."""
        self._resumed = checkpoint.open_run(self.config, self.ranks, trainable)
        self.ledger.before = checkpoint.spent_before(self._resumed, "ledger")
        self._seconds_before = checkpoint.spent_before(self._resumed, "seconds")

    def begin(self, training: Training, columns: Sequence[Column], stage: str) -> None:
        """Restores the checkpoint, if there is one, and begins to measure. It is called just before the loop.

        columns: those of the method. stage: the clock's name for the collection of its rows. An evaluation before
        the loop is expected to take as long again after it, and the remaining time of records includes that.
        """
        self.training, self._collecting = training, stage
        if self._resumed:
            self.done = checkpoint.restore(training, self._resumed, self.ranks)
            if self.ranks.first:
                print(f"going on after iteration {self.done}", flush=True)
        columns = (*columns, *ledger.COLUMNS)
        iterations = self.config.iterations
        self.metrics = Metrics(self.dir, self.ranks.device, self.ranks.first, columns, self.done, iterations)
        self.metrics.seconds_after_loop = self.clock.seconds().get("evaluate", 0.0)
        if self.ranks.first:
            self.tracker = open_tracker(self.run.tracker, self.dir, self.done, self.config.model_dump(mode="json"))
        self.progress = Progress(iterations, columns)
        self.clock.lap()

    def iterations(self) -> Iterator[int]:
        """Yields the iterations that are still to be done, counted from 0."""
        for iteration in range(self.done, self.config.iterations):
            self.live.iteration = f"{iteration + 1}/{self.config.iterations}"
            yield iteration

    def note(self, values: Mapping[str, Value | tuple[Value, Value]], weight: Value = 1.0) -> None:
        """Adds values to the columns of these names; weight is that of means which bring none."""
        self.metrics.add(values, weight)

    def log(self, done: int, now: bool = False) -> None:
        """Writes and shows the record after `done` iterations, if it is due or `now` is set. Every rank calls it."""
        if not (now or done == self.config.iterations or done % self.run.log_every == 0):
            return
        seconds = self.clock.lap()
        self.ledger.add_to(self.metrics, seconds.get(self._collecting, 0.0) + seconds.get("update", 0.0))
        record = self.metrics.flush(done, optimizer_steps=self.training.optimizer.steps, seconds=seconds)
        if self.ranks.first:
            self.live.erase()
            self.progress.show(record)
            if self.tracker:
                self.tracker.write(record)

    def save(self, done: int, now: bool = False) -> None:
        """Writes a checkpoint after `done` iterations, if it is due or `now`. Every rank calls it."""
        self.done = done
        if now or done == self.config.iterations or done % self.run.save_every == 0:
            with self.clock("save"):
                spent = {"seconds": self.seconds(), "ledger": self.ledger.totals()}
                checkpoint.save(self.training, self.config, done, self.ranks, spent)

    def seconds(self) -> dict[str, float]:
        """Returns seconds by stage and in total since the run began, those before a resumption included."""
        before = self._seconds_before
        now = self.clock.seconds() | {"total": time.perf_counter() - self._begun}
        return {stage: before.get(stage, 0.0) + now.get(stage, 0.0) for stage in {**before, **now}}

    @property
    def device_name(self) -> str:
        """What the device of this process is called: the name of a GPU, or "cpu"."""
        device = self.ranks.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def summary(self) -> dict[str, Any]:
        """Returns what summary.json has of every run, on other ranks {}. A collective call, after the loop."""
        totals = self.ledger.totals()
        if not self.ranks.first:
            return {}
        last, seconds, optimizer = read_records(self.metrics.path)[-1], self.seconds(), self.training.optimizer
        work_seconds = seconds[self._collecting] + seconds["update"]
        return {
            "seconds": seconds,
            "ledger": ledger.summarise(totals),
            "iterations": self.done,
            "prompts": last["prompts"],
            "prompts_per_second": last["prompts"] / work_seconds,
            "pairs": last.get("pairs"),
            "optimizer_steps": optimizer.steps,
            "waiting_micro_batches": optimizer.waiting,
            "optimizer_state_bytes_per_rank": optimizer.state_bytes(),
            "world_size": self.ranks.size,
            "device": self.device_name,
            "seed": self.run.seed,
            "version": version("strop"),
            "paths": {
                "run": str(self.dir),
                "report": str(self.dir / "report.html"),
                "checkpoints": str(self.dir / "checkpoints"),
            },
        }
