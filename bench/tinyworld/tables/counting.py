"""Counts what an iteration of a row costs, whatever its method: the cost of a longer run less that of a shorter one."""

from __future__ import annotations

import os
import tempfile
from contextlib import redirect_stdout

from torch.nn.attention import SDPBackend, sdpa_kernel

from strop.bench.tinyworld.runs import flop_of
from strop.bench.tinyworld.tables.cells import ENGINE_ITSELF
from strop.bench.tinyworld.tables.rows import ITERATIONS, TFLOP, Row
from strop.engine import training
from strop.engine.config.find import load

FIRST, MORE = 1, 2  # iterations of the shorter run, and how many more the longer one has


def tflop(row: Row) -> float:
    """Returns 10^12 operations of an iteration: of matrix products and convolutions, as FlopCounterMode counts them."""
    shorter, longer = (_of_run(row, iterations) for iterations in (FIRST, FIRST + MORE))
    return (longer - shorter) / MORE / 1e12


def iterations(tflop: float) -> int:
    """Returns how many iterations of such a cost the budget buys."""
    return max(1, round(ITERATIONS * TFLOP / tflop))


def _of_run(row: Row, iterations: int) -> float:
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        length = (f"run.iterations={iterations}", f"run.save_every={iterations}", f"run.dir={folder}/run")
        config = load(row.recipe, [*row.changes, *ENGINE_ITSELF, *length])
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of a CPU would not be counted
            return flop_of(lambda: training.run(config))[1]
