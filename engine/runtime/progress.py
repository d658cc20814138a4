"""Shows a run on the terminal: a line per record of metrics.jsonl, and one that moves within an iteration.

Both fit into 80 columns. The lines of records are made from the method's columns; the moving one is for a person who
waits, and nothing of it reaches a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

from .columns import Column

LINES_PER_HEADER = 20
DAY = 86400  # seconds
T = TypeVar("T")


class Progress:
    """Prints records as aligned lines, with a header above every 20th."""

    def __init__(self, iterations: int, columns: Sequence[Column], stream: TextIO | None = None):
        self._iterations = iterations
        self._columns = [column for column in columns if column.form]
        self._stream = stream or sys.stdout
        self._shown = 0

    def show(self, record: dict) -> None:
        """Prints the line of a record of `Metrics.flush`. Headers are bold on a terminal; a file gets no codes."""
        if self._shown % LINES_PER_HEADER == 0:
            header = _aligned((heading, width) for heading, _, width in self._cells({}))
            print(f"\033[1m{header}\033[0m" if self._stream.isatty() else header, file=self._stream)
        line = _aligned((cell, width) for _, cell, width in self._cells(record))
        print(line, file=self._stream, flush=True)
        self._shown += 1

    def _cells(self, record: dict) -> Iterator[tuple[str, str, int]]:
        """Yields (heading, value as text, width) of each column; the text is a dash where nothing was measured."""
        yield "iteration", f"{record.get('iteration')}/{self._iterations}", max(9, 2 * len(str(self._iterations)) + 1)
        seconds = record.get("eta_seconds")
        yield "ETA", "-" if seconds is None else _remaining(seconds), 9
        for column in self._columns:
            value = record.get(column.name)
            for label in column.labels:
                heading = column.heading.format(label)
                yield heading, _written((value or {}).get(str(label)), column.form), max(6, len(heading) + 1)
            if not column.labels:
                yield column.heading, _written(value, column.form), max(8, len(column.heading) + 1)


class LiveLine:
    """Keeps one line of a terminal that says how far the iteration is: "3/14 rollout 7/16".

    It is written anew at most twice a second. If the stream is no terminal, or `enabled` is false, nothing is
    written at all. iteration: the text with which the line begins.
    """

    EVERY = 0.5  # seconds

    def __init__(self, enabled: bool = True, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._enabled = enabled and self._stream.isatty()
        self._written_at = time.monotonic()  # so that an iteration of less than half a second shows nothing
        self._visible = False
        self.iteration = ""

    def counted(self, items: Iterable[T], total: int, stage: str) -> Iterator[T]:
        """Yields the items; before each, the line may say which one of the `total` items of the stage it is."""
        for number, item in enumerate(items, start=1):
            if self._enabled and time.monotonic() - self._written_at >= self.EVERY:
                self._write(f"{self.iteration} {stage} {number}/{total}")
            yield item

    def erase(self) -> None:
        """Removes the line, so that another may be printed in its place."""
        if self._visible:
            self._write("")

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\033[K{text}")  # to the beginning of the line, and clear it
        self._stream.flush()
        self._visible, self._written_at = bool(text), time.monotonic()


def duration(seconds: float) -> str:
    """Returns h:mm:ss, with days in front when there are any: 65 -> "0:01:05"."""
    days, seconds = divmod(round(seconds), DAY)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{days}d {clock}" if days else clock


def _aligned(cells: Iterable[tuple[str, int]]) -> str:
    """Returns the (text, width) cells as one line; at least a space stands between two, whatever their widths."""
    first, *others = cells
    return first[0].rjust(first[1]) + "".join(f" {text.rjust(width - 1)}" for text, width in others)


def _remaining(seconds: float) -> str:
    """Returns the duration in at most eight characters: from a day on, days and hours alone."""
    return duration(seconds) if round(seconds) < DAY else f"{round(seconds) // DAY}d {round(seconds) % DAY // 3600}h"


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
