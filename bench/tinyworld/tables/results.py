"""What the cells say: gains over the base model and differences of rows, with their spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from strop.bench.tinyworld.geneval import TASKS
from strop.bench.tinyworld.tables.rows import ITERATIONS, TFLOP, Row
from strop.engine.evaluation.compare import paired_delta

Scores = Mapping[str, Sequence[float]]
GENEVAL = "geneval"


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, its 95% interval over prompts (None where there are too few), and each seed's own."""

    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]

    @property
    def sure(self) -> int:
        """+1 or -1 where the interval and every seed lie on one side of 0, else 0."""
        low, high = self.interval or (0.0, 0.0)
        return (min(low, *self.seeds) > 0) - (max(high, *self.seeds) < 0)


@dataclass(frozen=True, slots=True)
class Results:
    """The finished cells, by the name of their row and by seed, and the base model's."""

    base: Mapping
    cells: Mapping[str, Mapping[int, Mapping]]

    def seeds(self, row: Row) -> list[int]:
        """Returns the seeds at which a row is finished."""
        return sorted(self.cells.get(row.name, {}))

    def gain(self, row: Row, score: str, task: str = "") -> Difference | None:
        """Returns what a row gains over the base model; None where it has not been run.

        score: one of SCORES, or GENEVAL, of one task or of all.
        """
        before = values(self.base, score, task)
        return self._difference([(before, values(cell, score, task)) for cell in self._of(row).values()])

    def against(self, row: Row, other: Row, score: str) -> Difference | None:
        """Returns row - other at the seeds that both have; None where there is none."""
        mine, others = self._of(row), self._of(other)
        common = sorted(mine.keys() & others.keys())
        return self._difference([(values(others[seed], score), values(mine[seed], score)) for seed in common])

    def curves(self, row: Row, score: str, prompts: int) -> list[list[tuple[float, float]]]:
        """Returns for each seed (share of the budget, gain) of the first `prompts` prompts, from (0, 0) on."""
        budget, start = ITERATIONS * TFLOP, fmean(values(self.base, score)[:prompts])
        curves = []
        for cell in self._of(row).values():
            ends = [point[score] for point in cell["curve"][:-1]] + [fmean(values(cell, score)[:prompts])]
            shares = [point["iteration"] * row.tflop / budget for point in cell["curve"]]
            curves.append([(0.0, 0.0), *zip(shares, (end - start for end in ends), strict=True)])
        return curves

    def _of(self, row: Row) -> Mapping[int, Mapping]:
        return self.cells.get(row.name, {})

    @staticmethod
    def _difference(pairs: Sequence[tuple[list[float], list[float]]]) -> Difference | None:
        """Takes (before, after) of each seed; the interval is of the prompts' means over seeds."""
        if not pairs:
            return None
        before, after = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
        found = paired_delta(before.mean(0), after.mean(0))
        interval = tuple(found["ci95"]) if found["ci95"] else None
        return Difference(found["delta"], interval, tuple((after - before).mean(1).tolist()))


def values(cell: Mapping, score: str, task: str = "") -> list[float]:
    """Returns a score of every prompt."""
    if score != GENEVAL:
        return cell["scores"][score]
    return [value for name in TASKS if task in ("", name) for value in cell[GENEVAL][name]]
