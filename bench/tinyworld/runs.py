"""Runs engine/train.py as it is, one thread a run, and counts operations, for all that compares whole runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from strop.engine.errors import UserError
from strop.engine.plan.meter import EXTRA_FORMULAS

ROOT = Path(__file__).parents[2]


def train(recipe: str, changes: Sequence[str], run: Path, script: str = "train.py") -> Path:
    """Runs a script of engine/ on one thread into the folder `run`, after removing an interrupted run. Returns `run`.

    changes: `key=value`, all but run.dir. What the run prints goes to a .log beside the folder. Raises UserError when
    it fails.
    """
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_name(f"{run.name}.log")
    with open(log, "w") as terminal:
        done = subprocess.run(
            [sys.executable, str(ROOT / "engine" / script), recipe, *changes, f"run.dir={run}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=terminal,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise UserError(f"{run}: training stopped with exit code {done.returncode}; {log} says why")
    return run


def run_all(tasks: Sequence[Callable[[], Path]], jobs: int) -> None:
    """Calls every task, `jobs` at once; prints after each what it has made and how many minutes are left.

    Where one raises, those that have not begun are dropped and its error is raised.
    """
    begun = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                left = (time.perf_counter() - begun) / count * (len(tasks) - count)
                print(f"{count}/{len(tasks)} {future.result().name} | {left / 60:.0f} min left", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def flop_of(work: Callable) -> tuple[Any, float]:
    """Returns the result of `work()` and the operations of its matrix products and convolutions."""
    with FlopCounterMode(display=False, custom_mapping=EXTRA_FORMULAS) as mode:
        result = work()
    return result, mode.get_total_flops()
