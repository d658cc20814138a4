"""Ends a run by SIGTERM, SIGHUP or Ctrl-C: at once while there is nothing to lose, else when the iteration is done."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, suppress
from signal import SIG_IGN, Signals, signal
from types import FrameType

import torch
import torch.distributed as dist

from ..errors import SIGNALS, Interrupted, signals_to
from .ranks import Ranks

ECHO = 5.0  # seconds in which a launcher repeats what the terminal has already sent to every rank


class Stop:
    """Holds the signal that has come, if one has. waits: whether it is to wait until `agreed` is asked.

    A second one ends the process at once.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.waits = ranks, False
        self._number, self._since = 0, 0.0

    def handled(self) -> AbstractContextManager[None]:
        """Returns a context in which signals come here; those who had them before get them back after it."""
        return signals_to(self._take)

    def agreed(self) -> int:
        """Returns the signal by which the run is to end, 0 for none: the same on all ranks. A collective call."""
        if self.ranks.size == 1:
            return self._number
        number = torch.tensor(self._number, device=self.ranks.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)  # one wait an iteration

    def _take(self, number: int, frame: FrameType | None) -> None:
        if Signals(number).name == "SIGHUP":
            _leave_terminal()
        if self._number and self.ranks.size > 1 and time.monotonic() < self._since + ECHO:
            return
        if self._number or not self.waits:
            raise Interrupted(number)
        self._number, self._since = number, time.monotonic()
        if self.ranks.first:
            _say(f"{Signals(number).name}: the run ends when this iteration is done, a second signal ends it at once")


def ignore_signals(worker: int) -> None:
    """Leaves it to the run to end this worker of a DataLoader, whose data the iteration needs (worker_init_fn)."""
    for number in SIGNALS:
        signal(number, SIG_IGN)


def _say(sentence: str) -> None:
    """Prints from within a signal handler, which may have interrupted another print."""
    with suppress(OSError):
        os.write(2, f"\nstrop: {sentence}\n".encode())


def _leave_terminal() -> None:
    """Lets stdout and stderr lead nowhere if the terminal is gone: prints must not fail before the checkpoint."""
    try:
        os.write(1, b"")
        os.write(2, b"")
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
