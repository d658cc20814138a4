"""The terminal's view of a run: one aligned line per record of metrics.jsonl, made from the method's columns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from .columns import Column

HEADED_EVERY = 20  # lines


class Progress:
    """`show(record)` prints one aligned line, with a header above every 20th."""

    def __init__(self, iterations: int, columns: Sequence[Column], stream: TextIO | None = None):
        self._iterations = iterations
        self._columns = [column for column in columns if column.form]
        self._stream = stream or sys.stdout
        self._shown = 0

    def show(self, record: dict) -> None:
        """Print the line of a record of `Metrics.flush`. Bold headers on a terminal, no codes anywhere else."""
        if self._shown % HEADED_EVERY == 0:
            header = "".join(heading.rjust(width) for heading, _, width in self._cells({}))
            print(f"\033[1m{header}\033[0m" if self._stream.isatty() else header, file=self._stream)
        line = "".join(cell.rjust(width) for _, cell, width in self._cells(record))
        print(line, file=self._stream, flush=True)
        self._shown += 1

    def _cells(self, record: dict) -> Iterator[tuple[str, str, int]]:
        """(heading, value as text, width) of each column; a dash where nothing was measured."""
        yield "iteration", f"{record.get('iteration')}/{self._iterations}", 11
        for name, heading, form in (
            ("prompts_per_second", "prompts/s", "{:.3g}".format),
            ("eta_seconds", "ETA", duration),
        ):
            value = record.get(name)
            yield heading, "-" if value is None else form(value), 10
        for column in self._columns:
            value = record.get(column.name)
            if column.labels:
                yield from self._vector(column, value or {})
            else:
                yield column.heading, _written(value, column.form), max(8, len(column.heading) + 2)

    @staticmethod
    def _vector(column: Column, values: dict) -> Iterator[tuple[str, str, int]]:
        for label in column.labels:
            heading = column.heading.format(label)
            yield heading, _written(values.get(str(label)), column.form), max(7, len(heading) + 2)


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front when there are any: 65 -> "0:01:05"."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


def _written(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
