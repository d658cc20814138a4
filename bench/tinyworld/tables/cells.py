"""A cell is one row at one seed: trained by engine/train.py, measured along the way, and kept in a small JSON file.

A finished cell is not made again. It holds the settings by which it was made, and is refused where they are no longer
those of its row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from strop.bench.tinyworld.runs import ROOT, train
from strop.bench.tinyworld.tables.examination import Examination, answers
from strop.bench.tinyworld.tables.rows import NO_STEP_JUDGE, Row
from strop.engine.config.find import load
from strop.engine.config.training import Config
from strop.engine.errors import UserError
from strop.engine.runtime.files import write_atomically
from strop.engine.runtime.run_folder import MAY_CHANGE

HELDOUT = ROOT / "bench" / "tinyworld" / "prompts" / "heldout.txt"
JUDGE_RECIPE = "configs/judge_tinyworld.yaml"
POINTS = 4  # of a curve
Measure = Callable[[Row, Path], dict]  # (row, run folder) -> what a cell holds beside its definition
JUDGE = Lock()  # one run of those at once trains it
ENGINE_ITSELF = ("evaluate.prompts=1", "evaluate.scorers=[]", "run.tracker=none")  # what it measures is not used


@dataclass(frozen=True, slots=True)
class Study:
    """Where cells and runs lie and how much is run: a share of the budget, and prompts.

    prompts: at a run's end; inner: at the points before; tasks: of each task of GenEval's twin, two images each.
    searched: whether methods take the learning rate that a search finds, or their recipe's.
    """

    cells: Path
    runs: Path
    share: float = 1.0
    prompts: int = 192
    inner: int = 64
    tasks: int = 20
    searched: bool = True
    measuring: Lock = field(default_factory=Lock)  # the examination's networks are shared by all threads

    def iterations(self, row: Row) -> int:
        """Returns how many iterations of a row the study's share of the budget buys."""
        return max(1, round(self.share * row.iterations))

    def file(self, row: Row, seed: int) -> Path:
        return self.cells / f"{row.name}-{seed}.json"


def settings(config: Config, prefix: str = "") -> dict[str, Any]:
    """Returns by dotted key all settings that decide what a run computes."""
    found = {}
    for name, value in config.model_dump(mode="json").items():
        section = value if isinstance(value, dict) else {}
        found |= {f"{name}.{key}": each for key, each in section.items()} or {name: value}
    ignored = set(MAY_CHANGE) - {"run.iterations"}
    return {key: value for key, value in found.items() if key not in ignored}


def keys(row: Row, seed: int, study: Study) -> list[str]:
    """Returns the `key=value` arguments of a cell's run, but its folder."""
    iterations = study.iterations(row)
    every = max(1, round(iterations / POINTS))
    run = (f"run.iterations={iterations}", f"run.save_every={every}", f"run.seed={seed}")
    return [*row.changes, *ENGINE_ITSELF, *run]


def read(row: Row, seed: int, study: Study) -> dict | None:
    """Returns a finished cell, None where there is none. Raises UserError where it is one of another definition."""
    file = study.file(row, seed)
    if not file.exists():
        return None
    try:
        cell = json.loads(file.read_text())
        made_by, recipe = cell["settings"], cell["recipe"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: found no cell of the tables; delete it, and it is made anew") from None
    if recipe != row.recipe:
        raise UserError(f"{file}: made by {recipe}, expected {row.recipe}; delete it, and it is made anew")
    now = settings(load(row.recipe, [*keys(row, seed, study), f"run.dir={study.runs}"]))
    changed = [key for key in made_by if key in now and made_by[key] != now[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{file}: made with {key}={made_by[key]}, but {row.name} now has {now[key]}; delete it, and it is made anew"
        )
    return cell


def make(row: Row, seed: int, study: Study, measure: Measure) -> Path:
    """Trains and measures a cell and writes its file, whose path it returns; the run's checkpoints are then removed."""
    if row.name == "judge_no_step":
        train_judge()
    changes = keys(row, seed, study)
    run = train(row.recipe, changes, study.runs / f"{row.name}-{seed}")
    config = load(run / "config.yaml")
    iterations = config.run.iterations
    definition = {
        "row": row.name,
        "seed": seed,
        "recipe": row.recipe,
        "changes": list(row.changes),
        "iterations": iterations,
        "tflop": round(iterations * row.tflop, 3),
        "settings": settings(config),
    }
    with study.measuring:
        found = measure(row, run)
    file = study.file(row, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, written(definition | found))
    shutil.rmtree(run / "checkpoints")
    return file


def train_judge() -> None:
    """Trains the judge without step condition, unless it is there."""
    folder = Path(NO_STEP_JUDGE)
    with JUDGE:
        if not (folder / "summary.json").exists():
            train(JUDGE_RECIPE, ["judge.kind=spm_no_step", "run.tracker=none"], folder, "train_judge.py")


def along(examination: Callable[[], Examination], study: Study, row: Row, run: Path) -> dict:
    """Returns the curve over a run's checkpoints, and at its end the scores of each prompt and GenEval's twin."""
    checkpoints = sorted((run / "checkpoints").glob("[0-9]*"))
    last = int(checkpoints[-1].name)
    curve = []
    for checkpoint in checkpoints:
        done = int(checkpoint.name)
        scores = examination()(checkpoint, None if done == last else study.inner)
        point = {"iteration": done, "tflop": round(done * row.tflop, 3), "prompts": len(scores["quality"])}
        curve.append(point | means(scores))
    loop = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    steps = {"optimizer_steps": loop["optimizer_steps"]}
    asked = {"geneval": answers(checkpoints[-1], study.tasks, 2)} if row.geneval else {}
    return steps | {"curve": curve, "scores": rounded(scores)} | asked


def measure_base(examination: Callable[[], Examination], study: Study) -> None:
    """Writes the base model's scores, unless they are there."""
    file = base_file(study)
    if not file.exists():
        scores = examination()(None)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, written({"scores": rounded(scores), "geneval": answers(None, study.tasks, 2)}))


def base(study: Study) -> dict:
    """Returns the base model's scores. Raises UserError where they have not been measured."""
    file = base_file(study)
    if not file.exists():
        raise UserError(f"{file}: found none, expected the base model's scores; run without --page, which measures it")
    return json.loads(file.read_text())


def base_file(study: Study) -> Path:
    return study.cells / "base.json"


def heldout(study: Study) -> list[str]:
    """Returns the prompts of the tables."""
    return HELDOUT.read_text().splitlines()[: study.prompts]


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: round(values.double().mean().item(), 5) for name, values in scores.items()}


def rounded(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in values.tolist()] for name, values in scores.items()}


def written(content: dict) -> str:
    """Returns JSON with a line for each entry, so that a cell is small and its changes can be read."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"
