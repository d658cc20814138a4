"""The terminal's view of a run: one aligned line per record of metrics.jsonl."""

import sys
from collections.abc import Sequence
from typing import TextIO


class Progress:
    """The terminal's view of a run: `show(record)` prints one aligned line, with a header above every 20th."""

    def __init__(self, iterations: int, stream: TextIO = sys.stdout):
        self._iterations = iterations
        self._stream = stream
        self._shown = 0

    def show(self, record: dict) -> None:
        """Print the line of a record of `Metrics.flush`. Bold headers on a terminal, no codes anywhere else."""
        if self._shown % 20 == 0:
            header = progress_header()
            print(f"\033[1m{header}\033[0m" if self._stream.isatty() else header, file=self._stream)
        print(progress_line(record, self._iterations), file=self._stream, flush=True)
        self._shown += 1


def progress_header() -> str:
    """The header over the columns of `progress_line`."""
    names = ("iteration", "prompts/s", "ETA", "judge", "pairs", "kept", "margin", "accuracy", "clipped", "grad norm")
    return _columns(names)


def progress_line(record: dict, iterations: int) -> str:
    """One line for a record of `Metrics.flush`, at most 100 columns; a dash where nothing was measured.

    "pairs" counts from the beginning of the run; "kept" is the share of possible pairs of these iterations.
    """
    formats = {
        "prompts_per_second": "{:.3g}", "eta_seconds": None, "judge": "{:.4g}", "pairs": "{:,}", "kept": "{:.0%}",
        "margin": "{:+.3f}", "accuracy": "{:.0%}", "clipped": "{:.0%}", "grad_norm": "{:.3g}",
    }  # fmt: skip
    cells = [f"{record['iteration']}/{iterations}"]
    for name, form in formats.items():
        value = record.get(name)
        cells.append("-" if value is None else form.format(value) if form else duration(value))
    return _columns(cells)


def duration(seconds: float) -> str:
    """h:mm:ss, with days in front when there are any: 65 -> "0:01:05"."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


def _columns(cells: Sequence[str]) -> str:
    widths = (11, 10, 11, 9, 10, 6, 8, 9, 8, 10)
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
