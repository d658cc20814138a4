"""Collects what a run measures: sums on the device, and one JSON line per logged iteration.

Numbers of the loop are added up on the device and reach the host in one transfer when they are logged. columns.py says
what they mean, and report/ what they say of a run, from the lines written here.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .columns import Column
from .files import write_atomically, writing

Value = Tensor | float
# The fields of every record beside its columns: iterations done, optimizer steps of the whole run, and, since the last
# record, seconds by stage and prompts per second. eta_seconds is the remaining time of the whole run at its pace.
FIELDS = ("iteration", "optimizer_steps", "seconds", "prompts_per_second", "eta_seconds")


class Metrics:
    """Sums on the device, over all ranks; each `flush` writes a line of metrics.jsonl.

    Every rank adds and flushes; only the one with `enabled` writes. seconds_after_loop: how long the run is expected to
    take once its iterations are done; eta_seconds includes it.
    """

    def __init__(
        self,
        run_dir: Path | str,
        device: torch.device | str,
        enabled: bool,
        columns: Sequence[Column],
        start: int,
        iterations: int,
    ):
        """Begins to measure, so it is called just before the loop: the first `prompts_per_second` counts from here.

        columns: all that will be added. start: iterations already done; lines after it are cut (see `rewind`), so 0
        begins the file anew. iterations: of the whole run, for the ETA.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self._device = torch.device(device)
        self._enabled = enabled
        self._iterations = iterations
        self._columns = {column.name: column for column in columns}
        self._slots: dict[str, slice] = {}
        size = 0
        for column in columns:
            self._slots[column.name] = slice(size, size := size + max(1, len(column.labels)))
        self._sums = torch.zeros(2, size, dtype=torch.float64, device=self._device)  # of weight * value, of weights
        self.seconds_after_loop = 0.0
        self.rewind(start)

    def add(self, values: Mapping[str, Value | tuple[Value, Value]], weight: Value = 1.0) -> None:
        """Adds to the columns of these names: to sums for the kinds `sum` and `total`, else to weighted means.

        A value is a scalar, or a vector with as many numbers as its column has labels; a pair (value, weight) has a
        weight of its own. weight: how many items a mean is of (micro-batches differ in size); with weight 0 the value
        is ignored even when it is NaN, as the mean of nothing is. ValueError for a name without a column.
        """
        for name, value in values.items():
            if name not in self._columns:
                raise ValueError(f"{name!r} is in none of the columns {', '.join(self._columns)}")
            mean = self._columns[name].kind == "mean"
            value, value_weight = value if isinstance(value, tuple) else (value, weight if mean else 1.0)
            value, value_weight = self._on_device(value), self._on_device(value_weight)
            slot = self._slots[name]
            self._sums[0, slot] += torch.where(value_weight > 0, value * value_weight, 0.0)
            self._sums[1, slot] += value_weight

    def flush(self, iteration: int, **extra) -> dict:
        """Writes the record of the iterations since the last flush, begins new sums, and returns the record.

        A collective call: every rank must make it. iteration: iterations done, counted from 1. extra: plain numbers and
        dicts of numbers of this rank (optimizer_steps=..., seconds=stopwatch.lap()). A value not measured is None. A
        value that is NaN or infinite is None too, and its name stands in record["nonfinite"], so that a broken run is
        told from an idle one.
        """
        record = dict.fromkeys(FIELDS) | {"iteration": iteration} | self._collect()
        record |= self._pace(iteration, record.get("prompts")) | extra
        nonfinite = [name for name, value in record.items() if finite(value) != value]
        record = finite(record) | ({"nonfinite": nonfinite} if nonfinite else {})
        if self._enabled:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that counts on this line is to come
        return record

    def unflushed(self) -> tuple[dict[str, Tensor], float]:
        """Returns this rank's sums (2, N) by column, which no record has yet, and the seconds since the last record."""
        sums = {name: self._sums[:, slot].clone() for name, slot in self._slots.items()}
        return sums, time.perf_counter() - self._marks[-1][1]

    def take_up(self, sums: Mapping[str, Tensor], seconds: float) -> None:
        """Goes on from what `unflushed` returned; columns that are other ones now begin with nothing."""
        for name, value in sums.items():
            slot = self._slots.get(name)
            if slot and value.shape == self._sums[:, slot].shape:
                self._sums[:, slot] = value.to(self._device)
        last = self._before.get("iteration", 0)
        self._marks[-1] = (last, time.perf_counter() - seconds, self._marks[-1][2])

    def rewind(self, iteration: int) -> None:
        """Cuts the lines after `iteration` from metrics.jsonl and goes on from the totals of the last line that stays.

        Sums not yet flushed are dropped. Every rank may call it at once: the lines that stay read the same before and
        after the cut. ValueError when a line other than the last cannot be read.
        """
        records = [record for record in read_records(self.path) if record["iteration"] <= iteration]
        self._sums.zero_()
        self.past = records
        self._before = records[-1] if records else {}
        self._marks = deque([(iteration, time.perf_counter(), self._before.get("prompts") or 0)], maxlen=20)
        if self._enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def _on_device(self, value: Value) -> Tensor:
        """Returns the value as float64 on the device. A number becomes a fill, so nothing waits for the device."""
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64, non_blocking=True)
        return torch.full((), float(value), dtype=torch.float64, device=self._device)

    def _collect(self) -> dict[str, float | dict | None]:
        """Returns the columns' values over all ranks by one reduction and one transfer to the host; resets the sums."""
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        totals, weights = sums.tolist()
        self._sums.zero_()
        values = {}
        for name, column in self._columns.items():
            slot = self._slots[name]
            numbers = [self._value(column, s, w) for s, w in zip(totals[slot], weights[slot], strict=True)]
            labelled = column.labels and any(weights[slot])
            values[name] = dict(zip(map(str, column.labels), numbers, strict=True)) if labelled else numbers[0]
            if column.kind == "total":
                self._before = self._before | {name: values[name]}
        return values

    def _value(self, column: Column, total: float, weight: float) -> float | None:
        if column.kind == "mean":
            return total / weight if weight else None
        before = self._before.get(column.name) if column.kind == "total" else None
        if not weight:
            return before
        return (before or 0) + (int(total) if total.is_integer() else total)

    def _pace(self, iteration: int, prompts: float | None) -> dict[str, float | None]:
        """Returns prompts_per_second since the last flush, and eta_seconds by the pace of the last 20 (wall clock)."""
        now = time.perf_counter()
        first, begin, _ = self._marks[0]
        _, last, prompts_then = self._marks[-1]
        self._marks.append((iteration, now, prompts or 0))
        pace = (now - begin) / (iteration - first) if iteration > first else None
        return {
            "prompts_per_second": None if prompts is None else (prompts - prompts_then) / (now - last),
            "eta_seconds": None if pace is None else pace * (self._iterations - iteration) + self.seconds_after_loop,
        }


def read_records(path: Path | str) -> list[dict]:
    """Returns the records of a metrics.jsonl, oldest first; none when there is no such file.

    A last line cut off by a killed run is left out. ValueError names any other line that is not a record.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [_record(line) for line in lines]
    if None in records[:-1]:
        raise ValueError(f"{path}: line {records.index(None) + 1} is not a record")
    return [record for record in records if record is not None]


def finite(value):
    """Returns the value with every NaN and infinity, at any depth of dicts and lists, replaced by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: str) -> dict | None:
    """Parses a line; returns None when it is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None
