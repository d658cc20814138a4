"""A session: all that a run has beside its method, from the run folder to the ledger.

It joins the processes, opens the run folder, keeps the clock, the ledger and the metrics, writes records and
checkpoints when they are due, and goes on from a checkpoint. A method (methods/) says what an iteration does; the loop
over iterations is in methods/loop.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from typing import Any

import torch

from ...kernels import use_reference
from ..errors import Interrupted, UserError
from . import checkpoint, ledger
from .checkpoint import Facts, Recipe, Training
from .columns import Column
from .files import writing
from .launchers import command
from .ledger import Ledger
from .metrics import Metrics, Value, read_records
from .progress import LiveLine, Progress
from .ranks import Ranks, start
from .run_folder import Inputs, RunFolder
from .stop import Stop
from .stopwatch import Stopwatch
from .tracker import Tracker, check_tracker, open_tracker
from .watch import Watch


class Session:
    """Holds one process's part of a run: `with Session.start(config) as session:`, then `open`, `begin` and the loop.

    metrics, training and progress exist from `begin` on. live: the line of the terminal that moves within an iteration.
    """

    metrics: Metrics
    training: Training
    progress: Progress

    def __init__(self, config: Recipe, ranks: Ranks, inputs: Inputs | None = None):
        """inputs: what the run reads, see RunFolder."""
        self.config, self.run, self.ranks = config, config.run, ranks
        self.folder = RunFolder(config, ranks, inputs or {})
        self.dir = self.folder.dir
        self.clock = Stopwatch(ranks.device)
        self.ledger = Ledger(ranks.device)
        self.live = LiveLine(ranks.first)
        self.stop = Stop(ranks)
        self.command = command()  # as long as the launcher is there to be asked
        self.tracker: Tracker | None = None  # on the first rank, from `begin` on
        self.done = 0  # iterations
        self.ending = 0  # the signal that ends the run after this iteration
        self._begun = time.perf_counter()
        self._before: dict[str, Any] = {}  # what the checkpoint that the run goes on from says of it
        self._since_record: dict[str, float] = {}  # seconds by stage
        self._collecting = ""  # the stage whose seconds, with those of the update, are a method's work

    @classmethod
    @contextmanager
    def start(cls, config: Recipe, inputs: Inputs | None = None) -> Iterator[Session]:
        """Joins the processes of the run and checks its folder, writing nothing. Raises UserError as RunFolder.check.

        So do, until the session ends, all errors of writing that a user can put right. A signal ends the run with an
        Interrupted that says how to go on.
        """
        check_tracker(config.run.tracker)
        use_reference(config.run.kernels == "reference")
        session = cls(config, start(config.run.device, config.run.rank_timeout), inputs)
        with (
            session.stop.handled(),
            Watch(session.ranks, config.run.rank_timeout, session.how_to_go_on),
            writing(session.dir),
            closing(session.folder),
        ):
            session.folder.check()
            try:
                with session.ledger:
                    yield session
            except Interrupted as end:
                if not session.ranks.first:
                    sys.exit(128 + end.number)
                raise Interrupted(end.number, f"ended by {end.name}; {session.how_to_go_on()}") from None
            finally:
                session.live.erase()
                if session.tracker:
                    session.tracker.close()

    def open(self) -> None:
        """Makes the run folder, or takes up that of a checkpoint. Raises UserError before anything is written."""
        self.folder.open()
        if self.folder.checkpoint:
            self._before = checkpoint.state_of(self.folder.checkpoint)
        self.ledger.before = self._before.get("ledger", {})

    def begin(self, training: Training, columns: Sequence[Column], stage: str) -> None:
        """Restores the checkpoint, if there is one, and begins to measure. It is called just before the loop.

        columns: those of the method. stage: the clock's name for the collection of its rows. An evaluation before
        the loop is expected to take as long again after it, and the remaining time of records includes that.
        """
        self.training, self._collecting = training, stage
        own = {}
        if self.folder.checkpoint:
            own = checkpoint.restore(training, self.folder.checkpoint, self.ranks)
            self.done = self._before["iteration"]
            if self.ranks.first:
                print(f"going on after iteration {self.done}", flush=True)
        columns = (*columns, *ledger.COLUMNS)
        iterations = self.config.iterations
        try:
            self.metrics = Metrics(self.dir, self.ranks.device, self.ranks.first, columns, self.done, iterations)
        except ValueError as error:
            raise UserError(f"{error}; mend or remove that line") from None
        self._since_record = dict(self._before.get("since_record", {}))
        self.metrics.take_up(own, self._since_record.pop("total", 0.0))
        self.metrics.seconds_after_loop = self.clock.seconds().get("evaluate", 0.0)
        if self.ranks.first:
            self.tracker = open_tracker(self.run.tracker, self.dir, self.done, self.config.model_dump(mode="json"))
        self.progress = Progress(iterations, columns)
        self.clock.lap()

    def iterations(self) -> Iterator[int]:
        """Yields the iterations that are still to be done, counted from 0. A signal waits until one is saved."""
        self.stop.waits = True
        try:
            for iteration in range(self.done, self.config.iterations):
                self.live.iteration = f"{iteration + 1}/{self.config.iterations}"
                yield iteration
        finally:
            self.stop.waits = False
        if number := self.stop.agreed():
            raise Interrupted(number)

    def how_to_go_on(self) -> str:
        """Says which checkpoint there is and what to type."""
        newest = checkpoint.newest(self.dir)
        if newest is None:
            return f"{self.dir} holds no checkpoint to go on from"
        return f"the checkpoint is {newest}, and this goes on from it: {self.command} run.resume=true"

    def note(self, values: Mapping[str, Value | tuple[Value, Value]], weight: Value = 1.0) -> None:
        """Adds values to the columns of these names; weight is that of means which bring none."""
        self.metrics.add(values, weight)

    def log(self, done: int, now: bool = False) -> None:
        """Writes and shows the record after `done` iterations, if it is due, `now` is set or a signal has come.

        Every rank calls it in every iteration.
        """
        self.ending = self.stop.agreed()
        if not (now or self.ending or done == self.config.iterations or done % self.run.log_every == 0):
            return
        self._settle()
        seconds, self._since_record = self._since_record, {}
        record = self.metrics.flush(done, optimizer_steps=self.training.optimizer.steps, seconds=seconds)
        if self.ranks.first:
            with suppress(OSError):  # Ctrl-C ends `| tee log` before this run, whose checkpoint is still to come
                self.live.erase()
                self.progress.show(record)
            if self.tracker:
                self.tracker.write(record)

    def save(self, done: int, now: bool = False, spared: int | None = None) -> None:
        """Writes a checkpoint after `done` iterations, if it is due or `now`. Every rank calls it.

        spared: the iteration of one that stays, though it is old.

        It does so too, and raises Interrupted, if a signal has come to any rank.
        """
        self.done = done
        if now or self.ending or done == self.config.iterations or done % self.run.save_every == 0:
            self._settle()
            with self.clock("save"):
                sums, total = self.metrics.unflushed()
                shared = {"seconds": self.seconds(), "since_record": self._since_record | {"total": total}}
                shared |= {"ledger": self.ledger.totals(), "inputs": self.folder.digests}
                checkpoint.save(self.training, self.config, done, self.ranks, Facts(shared, sums), spared)
        if self.ending:
            raise Interrupted(self.ending)

    def _settle(self) -> None:
        """Adds what clock and ledger have measured since the last call to the record to come."""
        lap = self.clock.lap()
        for stage, seconds in lap.items():
            self._since_record[stage] = self._since_record.get(stage, 0.0) + seconds
        self.ledger.add_to(self.metrics, lap.get(self._collecting, 0.0) + lap.get("update", 0.0))

    def seconds(self) -> dict[str, float]:
        """Returns seconds by stage and in total since the run began, those before a resumption included."""
        before = self._before.get("seconds", {})
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
