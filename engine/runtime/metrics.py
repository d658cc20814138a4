"""What a run measures: sums kept on the device, one JSON line per logged iteration, and the seconds of its stages.

The loss of SPO hovers at ln 2 whether a run works or not. What tells is the judge's score, the share of pairs kept, the
margin, the implicit accuracy and the clipped share; they are kept here as sums on the device and reach the host in one
transfer when they are logged. Nothing here says what is healthy: that is report/, from the lines written here.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

# One line of metrics.jsonl, in this order; what was not measured is null. "prompts", "pairs", "optimizer_steps",
# "gpu_hours" and "energy_wh" (sums over the GPUs) count from the beginning of the run, everything else covers the
# iterations since the line before: "share_of_peak" is that of the GPU's matrix arithmetic in rollout and update,
# "utilisation" is the share of time in which a kernel ran, "sm_mhz" and "memory_mhz"
# are clocks, "throttled" the share of readings by reason, all of them means over the GPUs (ledger.py), on the first
# line since the process began.
RECORD_FIELDS = (
    "iteration", "prompts", "pairs", "optimizer_steps", "judge", "kept", "pairs_per_t", "loss", "margin", "accuracy",
    "clipped", "grad_norm", "seconds", "prompts_per_second", "eta_seconds", "gpu_hours", "energy_wh",
    "share_of_peak", "utilisation", "sm_mhz", "memory_mhz", "throttled",
)  # fmt: skip


class Metrics:
    """Sums on the device, over all ranks; each `flush` writes a line of metrics.jsonl and the scalars of TensorBoard.

    Every rank adds and flushes; only the one with `enabled` writes. Three ways to add, by what the number means:
    `add_mean` (loss, margin, judge), `add_sum` (of these iterations: pairs per timestep), `add_total` (of the whole
    run: prompts, pairs). A name keeps its kind and its shape.
    """

    def __init__(
        self,
        run_dir: Path | str,
        device: torch.device | str,
        enabled: bool,
        *,
        start: int,
        iterations: int,
        labels: Mapping[str, Iterable[int | str]] | None = None,
    ):
        """Make it just before the loop: the first `prompts_per_second` counts from here.

        start: iterations already done. Lines after it are cut (see `rewind`), so 0 begins the file anew.
        iterations: of the whole run, for the ETA.
        labels: for a vector (T,), the T keys under which its values are written, such as
            {"pairs_per_t": schedule.t.tolist()}; a vector without labels is written as a list.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self._device = torch.device(device)
        self._enabled = enabled
        self._iterations = iterations
        self._labels = {name: [str(label) for label in keys] for name, keys in (labels or {}).items()}
        self._slots: dict[str, tuple[str, Tensor]] = {}  # name: (kind, (2, *shape) for a mean, (1, *shape) else)
        self._board = None
        self.rewind(start)

    def add_mean(self, weight: Tensor | float = 1.0, **values: Tensor | float) -> None:
        """Add to weighted means: sum(weight * value) / sum(weight) over all calls and ranks.

        weight: how many items the value is the mean of (micro-batches differ in size); with weight 0 the value is
        ignored even when it is NaN, as the mean of nothing is. Values: scalars, or vectors (T,) with a weight that
        broadcasts. ValueError when a name changes kind or shape.
        """
        weight = self._on_device(weight)
        for name, value in values.items():
            value = self._on_device(value)
            total = self._slot(name, "mean", value.shape)
            total[0] += torch.where(weight > 0, value * weight, 0.0)
            total[1] += weight

    def add_sum(self, **values: Tensor | float) -> None:
        """Add scalars or vectors (T,) to sums over the iterations until the next flush, and over all ranks."""
        for name, value in values.items():
            value = self._on_device(value)
            self._slot(name, "sum", value.shape)[0] += value

    def add_total(self, **values: Tensor | float) -> None:
        """Add scalars to sums over the whole run, that is over all ranks and with what was before a resumption."""
        for name, value in values.items():
            self._slot(name, "total", torch.Size())[0] += self._on_device(value)

    def flush(self, iteration: int, **extra) -> dict:
        """Write the record of the iterations since the last flush, begin new sums, and return the record.

        A collective call: every rank must make it. iteration: iterations done, counted from 1. extra: plain numbers and
        dicts of numbers of this rank (optimizer_steps=..., seconds=stopwatch.lap()); they win over what was added under
        the same name. What was not measured is None. A value that is NaN or infinite is None too, and its name stands
        in record["nonfinite"], so that a broken run is told from an idle one.
        """
        record = dict.fromkeys(RECORD_FIELDS) | {"iteration": iteration} | self._collect()
        record |= self._pace(iteration, record["prompts"]) | extra
        nonfinite = [name for name, value in record.items() if finite(value) != value]
        record = finite(record) | ({"nonfinite": nonfinite} if nonfinite else {})
        if self._enabled:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
            for name, number in _scalars(record):
                self._board.add_scalar(name, number, iteration)
            self._board.flush()
        return record

    def rewind(self, iteration: int) -> None:
        """Cut the lines after `iteration` from metrics.jsonl and go on from the totals of the last line that stays.

        Sums not yet flushed are dropped. Every rank may call it at once: the lines that stay read the same before and
        after the cut. ValueError when a line other than the last cannot be read.
        """
        kept = [record for record in read_records(self.path) if record["iteration"] <= iteration]
        self._slots.clear()
        self._before = kept[-1] if kept else {}
        self._marks = deque([(iteration, time.perf_counter(), self._before.get("prompts") or 0)], maxlen=20)
        if not self._enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.close()
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed on the other ranks

        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=iteration + 1)

    def close(self) -> None:
        """Close TensorBoard's file. metrics.jsonl is whole after every flush."""
        if self._board is not None:
            self._board.close()

    def _on_device(self, value: Tensor | float) -> Tensor:
        """float64 on the device. A number becomes a fill, so nothing waits for the device."""
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64, non_blocking=True)
        return torch.full((), float(value), dtype=torch.float64, device=self._device)

    def _slot(self, name: str, kind: str, shape: torch.Size) -> Tensor:
        if name not in self._slots:
            rows = 2 if kind == "mean" else 1
            self._slots[name] = kind, torch.zeros(rows, *shape, dtype=torch.float64, device=self._device)
        known, total = self._slots[name]
        if known != kind or total.shape[1:] != shape:
            raise ValueError(
                f"metric {name!r} is a {known} of shape {tuple(total.shape[1:])}, not a {kind} of shape {tuple(shape)}"
            )
        return total

    def _agree(self) -> None:
        """Give every rank the same slots in the same order: a rank without a single pair has added no loss."""
        layouts = [{name: (kind, total.shape[1:]) for name, (kind, total) in self._slots.items()}]
        if dist.is_initialized() and dist.get_world_size() > 1:
            layouts = layouts * dist.get_world_size()
            dist.all_gather_object(layouts, layouts[0])
        for layout in layouts:
            for name, (kind, shape) in layout.items():
                self._slot(name, kind, shape)
        self._slots = {name: self._slots[name] for layout in layouts for name in layout}

    def _collect(self) -> dict[str, float | list | None]:
        """The values of the sums over all ranks, by one reduction and one transfer to the host; the sums begin anew."""
        self._agree()
        if not self._slots:
            return {}
        flat = torch.cat([total.flatten() for _, total in self._slots.values()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        numbers = iter(flat.tolist())
        values = {}
        for name, (kind, total) in self._slots.items():
            rows = [[next(numbers) for _ in range(total[0].numel())] for _ in total]
            if kind == "mean":
                flat_values = [s / w if w else None for s, w in zip(*rows, strict=True)]
            else:
                before = (self._before.get(name) or 0) if kind == "total" else 0
                flat_values = [before + (int(s) if s.is_integer() else s) for s in rows[0]]
            values[name] = self._labelled(name, flat_values) if total[0].dim() else flat_values[0]
            if kind != "total":
                total.zero_()
        return values

    def _labelled(self, name: str, values: list) -> list | dict:
        return dict(zip(self._labels[name], values, strict=True)) if name in self._labels else values

    def _pace(self, iteration: int, prompts: float | None) -> dict[str, float | None]:
        """prompts_per_second since the last flush; eta_seconds from the pace of the last 20 flushes (wall clock)."""
        now = time.perf_counter()
        first, begin, _ = self._marks[0]
        _, last, prompts_then = self._marks[-1]
        self._marks.append((iteration, now, prompts or 0))
        pace = (now - begin) / (iteration - first) if iteration > first else None
        return {
            "prompts_per_second": None if prompts is None else (prompts - prompts_then) / (now - last),
            "eta_seconds": None if pace is None else pace * (self._iterations - iteration),
        }


class Stopwatch:
    """Seconds by stage: `with clock("rollout"): ...`.

    Names are taken as given; by custom "rollout/decode" is a part of "rollout", so a total sums the names without a
    slash. On CUDA a stage is timed by two events on the current stream, which are read in `seconds` and `lap` only: the
    stage itself never waits for the device. Elsewhere it is the wall clock.
    """

    def __init__(self, device: torch.device | str):
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}
        self._pending: list[tuple] = []  # (stage, begin, end) not yet added to _seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time inside the `with` to `stage`, also when it is left by an exception."""
        self._seconds.setdefault(stage, 0.0)  # at entry, so that a stage stands before its parts
        begin = self._now()
        try:
            yield
        finally:
            self._pending.append((stage, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage since the stopwatch was made, waiting for stages that ended. Open ones do not count."""
        for stage, begin, end in self._pending:
            self._seconds[stage] += self._between(begin, end)
        self._pending.clear()
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Seconds of each stage since the last lap (or since the stopwatch was made)."""
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


class RunTime:
    """Seconds by stage and in total since the run began, those before a resumption included."""

    def __init__(self, clock: Stopwatch, begun: float, before: Mapping[str, float]):
        """begun: time.perf_counter() of this process then; before: what the checkpoint says with which it goes on."""
        self._clock, self._begun, self._before = clock, begun, before

    def __call__(self) -> dict[str, float]:
        now = self._clock.seconds() | {"total": time.perf_counter() - self._begun}
        return {stage: self._before.get(stage, 0.0) + now.get(stage, 0.0) for stage in {**self._before, **now}}


def read_records(path: Path | str) -> list[dict]:
    """The records of a metrics.jsonl, oldest first; none when there is no such file.

    A last line cut off by a killed run is left out. ValueError names any other line that is not a record.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [_record(line) for line in lines]
    if None in records[:-1]:
        raise ValueError(f"{path}: line {records.index(None) + 1} is not a record")
    return [record for record in records if record is not None]


def finite(value):
    """The value with every NaN and infinity, at any depth of dicts and lists, replaced by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a kill, finds either the old content or the new."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _record(line: str) -> dict | None:
    """The record of a line, None when it is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None


def _scalars(record: dict) -> Iterator[tuple[str, float]]:
    """(TensorBoard tag, number) of a record: "train/loss", "seconds/rollout", "pairs_per_t/751"."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", item) for key, item in value.items() if item is not None)
        elif isinstance(value, int | float) and name != "iteration":
            yield f"train/{name}", value
