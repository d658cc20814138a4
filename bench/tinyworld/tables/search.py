"""The search for a learning rate: up to three a method, on prompts that the tables do not use, by one rule for all.

A method's recipe names a rate; that, three times and nine times it are run at the first training seed for the whole
budget, as long as PickScore on the search's prompts rises. The run at the rate that is taken is then a cell of the
tables. Half of the budget does not tell: at the rate that led there, D3PO lost by its end all that it had won.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from strop.bench.tinyworld.tables.cells import HELDOUT, Study, read, rounded, written
from strop.bench.tinyworld.tables.examination import Examination
from strop.bench.tinyworld.tables.rows import SEEDS, Row
from strop.engine.config.find import load
from strop.engine.runtime.files import write_atomically

PROMPTS, FACTORS = 96, (1, 3, 9)
SCORES = "search"  # the entry of a cell


def prompts() -> list[str]:
    """Returns the prompts of the search, the last that are held out; the tables take the first."""
    return HELDOUT.read_text().splitlines()[-PROMPTS:]


def rates(row: Row) -> list[float]:
    """Returns the learning rates to try, the smallest first, in two figures."""
    own = recipe_rate(row)
    return [own if factor == 1 else float(f"{own * factor:.2g}") for factor in FACTORS]


def recipe_rate(row: Row) -> float:
    return load(row.recipe, ["run.dir=runs", "run.iterations=1"]).optim.lr


def tried(row: Row, lr: float) -> Row:
    """Returns the row at a rate of the search."""
    return row if lr == recipe_rate(row) else row.with_rate(lr)


def at_the_end(examination: Callable[[], Examination], run: Path) -> dict:
    """Returns what a cell of the search holds besides: PickScore of each of its prompts at the run's end."""
    last = max((run / "checkpoints").glob("[0-9]*"))
    return {SCORES: rounded({"pickscore": examination()(last)["pickscore"]})["pickscore"]}


def measure_base(examination: Callable[[], Examination], study: Study) -> None:
    """Writes the base model's PickScore of each prompt of the search, unless it is there."""
    file = base_file(study)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, written({"scores": rounded({"pickscore": examination()(None)["pickscore"]})}))


def base(study: Study) -> list[float]:
    """Returns the base model's PickScore of each prompt of the search."""
    return json.loads(base_file(study).read_text())["scores"]["pickscore"]


def base_file(study: Study) -> Path:
    return study.cells / "search-base.json"


def found(row: Row, study: Study) -> dict[float, list[float]]:
    """Returns by learning rate the PickScore of each prompt, of the runs of the search that are finished."""
    cells = {lr: read(tried(row, lr), SEEDS[0], study) for lr in rates(row)}
    return {lr: cell[SCORES] for lr, cell in cells.items() if cell and SCORES in cell}


def missing(row: Row, study: Study) -> float | None:
    """Returns the rate to try next; None where the search is over."""
    scores, best = found(row, study), -math.inf
    for lr in rates(row):
        if lr not in scores:
            return lr
        if math.fsum(scores[lr]) < best:
            return None
        best = math.fsum(scores[lr])
    return None


def chosen(scores: Mapping[float, list[float]]) -> float:
    """Returns the rate of the largest mean score, or the smallest that is within a standard error of it.

    scores: by rate those of the same prompts (N,). The error is that of the mean difference of the two, by prompt.
    """
    best = max(scores, key=lambda lr: math.fsum(scores[lr]))

    def lags(lr: float) -> bool:
        behind = torch.tensor(scores[best], dtype=torch.float64) - torch.tensor(scores[lr], dtype=torch.float64)
        return bool(behind.mean() > behind.std() / math.sqrt(len(behind)))

    return min(lr for lr in scores if lr == best or not lags(lr))


def tuned(row: Row, study: Study) -> Row | None:
    """Returns the row at its chosen rate, None while its search is not over or its cost is uncounted."""
    if not row.iterations:
        return None
    if not study.searched:
        return row
    if missing(row, study) is not None:
        return None
    return tried(row, chosen(found(row, study)))
