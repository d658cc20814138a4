"""How far an evaluation is, on the terminal: one moving line with rate and ETA, and a line for each finished stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..runtime.progress import duration


class Progress:
    """Shows stages; the moving line only where stdout is a terminal, and nothing unless `enabled`."""

    def __init__(self, enabled: bool):
        """enabled: whether this process is the one that speaks."""
        self.enabled = enabled

    @contextmanager
    def stage(self, name: str, count: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Opens a stage of `count` items; the caller says how many more are done."""
        bar_format = "{desc:.32} {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left"
        moving = self.enabled and sys.stdout.isatty()
        with tqdm(
            total=count,
            desc=name,
            unit=f" {unit}",
            leave=False,
            file=sys.stdout,
            disable=not moving,
            bar_format=bar_format,
        ) as bar:
            start = time.monotonic()
            if self.enabled and not moving:
                print(f"{name}: {count} {unit} to go", flush=True)
            yield bar.update
            seconds = time.monotonic() - start
        if self.enabled:
            rate = count / max(seconds, 1e-9)
            print(f"{name[:32]}: {count} {unit}, {duration(seconds)}, {rate:.3g} a second", flush=True)
