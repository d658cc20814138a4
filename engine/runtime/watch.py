"""A thread beside a rank that sees when the launcher or another rank is gone, and ends this one then.

Without it a rank trains on where its launcher was killed, and waits in an exchange for whoever sleeps.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from .launchers import launchers
from .ranks import Ranks

BEAT = 1.0  # seconds
DEAD = 4  # beats without a sign of life, once an exchange has failed


class Watch:
    """Watches for the time of a `with` block; alone it does nothing.

    Each rank counts up a number of its own in the store where the ranks met. One whose number stands still for
    `timeout` seconds, or for a few where an exchange has just failed, is named on stderr, and this process exits with
    code 1. A launcher that is gone is taken for a SIGTERM. then: says what to do, at the end of the sentence.
    """

    def __init__(self, ranks: Ranks, timeout: float, then: Callable[[], str] = lambda: "start it again"):
        self.ranks, self.timeout, self.then = ranks, timeout, then
        self.counts = dict.fromkeys(range(ranks.size), 0)
        self.heard = dict.fromkeys(range(ranks.size), time.monotonic())  # when each was last seen alive
        self.left = threading.Event()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Watch:
        if self.ranks.store:
            self.store = self.ranks.store.clone()  # its own connection: the main thread waits in the other for long
            self.threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._judge)]
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.ranks.store and isinstance(error, RuntimeError):  # so do gloo and NCCL say that an exchange failed
            time.sleep((DEAD + 1) * BEAT)
            self._end_if_silent(DEAD * BEAT)
        self.left.set()
        for thread in self.threads:
            thread.join(BEAT)  # one that is in the store while Python ends would crash
        if self.ranks.store and error is None:
            with suppress(RuntimeError):
                self.ranks.store.set(f"left/{self.ranks.rank}", "")

    def _beat(self) -> None:
        """Counts up this rank's number and looks at the others'. Where rank 0 sleeps, so does the store, and this."""
        while not self.left.wait(BEAT):
            with suppress(RuntimeError):
                self.store.add(f"count/{self.ranks.rank}", 1)
                for rank in self.heard:
                    count = self.store.add(f"count/{rank}", 0)
                    if count != self.counts[rank] or self.store.check([f"left/{rank}"]):
                        self.counts[rank], self.heard[rank] = count, time.monotonic()

    def _judge(self) -> None:
        above, last = launchers(), time.monotonic()
        while not self.left.wait(BEAT):
            now = time.monotonic()
            if now - last > DEAD * BEAT:  # it was this process that slept, as all do in a job that is suspended
                self.heard = dict.fromkeys(self.heard, now)
            last = now
            if above and launchers() != above:
                above = []
                os.kill(os.getpid(), signal.SIGTERM)
            self._end_if_silent(self.timeout)

    def _end_if_silent(self, seconds: float) -> None:
        """Ends this process if a rank was not heard for as long; the first of those that are alive says so."""
        since = time.monotonic() - seconds
        silent = [rank for rank, heard in self.heard.items() if heard < since]
        if self.ranks.rank in silent:  # nobody is heard, not even this rank: the store is gone, which rank 0 keeps
            silent = [0]
        if not silent or self.left.is_set():
            return
        if self.ranks.rank == min(set(self.heard) - set(silent)):
            names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {self.ranks.size}"
            limit = f"for {seconds:g} s (run.rank_timeout)" if seconds == self.timeout else "any more"
            print(f"strop: {names} did not answer {limit}, so the run ends; {self.then()}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits in an exchange that never ends
