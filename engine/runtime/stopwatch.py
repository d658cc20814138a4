"""Times the stages of a run, without ever waiting for the device while a stage runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up seconds by stage: `with clock("rollout"): ...`.

    "rollout/decode" is a part of "rollout", whose seconds have those of its parts in them. Any other stage that begins
    inside an open one interrupts it: its seconds are its own alone. On CUDA a stage is timed by events on the current
    stream, which are read in `seconds` and `lap` only: the stage itself never waits for the device. Elsewhere it is
    the wall clock.
    """

    def __init__(self, device: torch.device | str):
        self.failed = ""  # the innermost stage that an exception has left
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}
        self._pending: list[tuple] = []  # (stage, begin, end) not yet added to _seconds
        self._open: list[list] = []  # [stage, begin] of the open stages, the innermost last; None while interrupted

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time inside the `with` to `stage`, also when it is left by an exception."""
        self._seconds.setdefault(stage, 0.0)  # at entry, so that a stage stands before its parts
        running = [outer for outer in self._open if outer[1] is not None]
        interrupted = [outer for outer in running if not stage.startswith(f"{outer[0]}/")]
        now = self._now()
        for outer in interrupted:
            self._pending.append((*outer, now))
            outer[1] = None
        self._open.append([stage, now])
        try:
            yield
        except BaseException:
            self.failed = self.failed or stage
            raise
        finally:
            now = self._now()
            self._pending.append((*self._open.pop(), now))
            for outer in interrupted:
                outer[1] = now

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each stage since the stopwatch was made; waits for ended stages, omits open ones."""
        for stage, begin, end in self._pending:
            self._seconds[stage] += self._between(begin, end)
        self._pending.clear()
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Returns the seconds of each stage since the last lap, or since the stopwatch was made."""
        seconds = self.seconds()
        lap = {stage: total - self._at_last_lap.get(stage, 0.0) for stage, total in seconds.items()}
        self._at_last_lap = seconds
        return lap

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> float:
        if not self._cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000  # ms
