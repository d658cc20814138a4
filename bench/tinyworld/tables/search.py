"""The search for a learning rate: three rates a method, on prompts that the tables do not use, by one rule for all.

A method's recipe names a rate; that, three times and nine times it are run at one seed, which no table has, for
half of the budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from strop.bench.tinyworld.tables.cells import HELDOUT, Study, read, rounded, written
from strop.bench.tinyworld.tables.examination import Examination
from strop.bench.tinyworld.tables.rows import SEARCH_SEED, Row
from strop.engine.config.find import load
from strop.engine.runtime.files import write_atomically

PROMPTS, SHARE, FACTORS = 96, 0.5, (1, 3, 9)


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
    """Returns the row of a run of the search."""
    return replace(row.with_rate(lr), name=f"search-{row.name}-lr{lr:g}")


def half(study: Study) -> Study:
    """Returns the study of which the search's runs are."""
    return replace(study, share=SHARE * study.share)


def at_the_end(examination: Callable[[], Examination], row: Row, run: Path) -> dict:
    """Returns what a cell of the search holds: PickScore of each prompt at the run's end."""
    last = max((run / "checkpoints").glob("[0-9]*"))
    return {"scores": rounded({"pickscore": examination()(last)["pickscore"]})}


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
    cells = {lr: read(tried(row, lr), SEARCH_SEED, half(study)) for lr in rates(row)}
    return {lr: cell["scores"]["pickscore"] for lr, cell in cells.items() if cell}


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
    """Returns the row at its chosen rate, None while a run of the search is missing or its cost is uncounted."""
    if not row.iterations:
        return None
    if not study.searched:
        return row
    scores = found(row, study)
    if len(scores) < len(FACTORS):
        return None
    lr = chosen(scores)
    return row if lr == recipe_rate(row) else row.with_rate(lr)
