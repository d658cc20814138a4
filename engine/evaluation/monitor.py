"""Evaluates a run while it trains, and notices a policy that pleases its judge and nothing else.

An evaluation is wrong if an independent score has fallen beyond chance; or if the judge's score has risen, no
independent one has, and the pictures have strayed from the base's (drift.py). After `evaluate.patience` wrong ones in a
row there is a warning, and by `evaluate.stop` the run ends. The best evaluation is, of those that are not wrong, the
one whose independent scores (the judge's, if there are none) have risen most, as a mean of base standard deviations.
PickScore is not independent: the paper's judges and tinyworld's are trained from one. A judge's files do not say from
what it was trained, so it is taken to be so for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..config.training import EvaluateConfig
from ..errors import warn
from ..runtime.columns import Column, Curve, Sign
from ..runtime.metrics import Value
from ..runtime.signs import listed, repeats_at_end
from ..scorers.scorer import pil_images
from .compare import beyond_chance, paired_delta
from .drift import DRIFT, drift, strayed
from .evaluator import Evaluation, Evaluator

JUDGE, PICKSCORE = "judge", "pickscore"
HELDOUT = Column("heldout")
CHANGE = Column(
    "heldout_change",
    heading="{}",
    drawn=Curve("Held-out change, in base deviations", "healthy: the independent scores rise with the judge's"),
)
STRAYED = Column(
    "drift",
    heading="{}",
    drawn=Curve("Drift of the pictures from the base's", "healthy: layout and diversity stay near 1"),
    signs=(
        Sign(
            lambda lines: listed(strayed({name: line[-1] for name, line in lines.items() if line})) or None,
            "The pictures have strayed from the base's in {}: look at samples/ whether that is what you want.",
            normal=True,
        ),
    ),
)
WRONG = Column(
    "wrong",
    signs=(
        Sign(
            repeats_at_end(2),
            "In the last {} evaluations while training, an independent score fell, or only the judge was pleased: take "
            "an earlier checkpoint.",
        ),
    ),
)
COLUMNS = (HELDOUT, CHANGE, STRAYED, WRONG)


def independent_of_judge(score: str, rewards: Collection[str] = ()) -> bool:
    """Whether a score is measured by something that a judge was not trained from, and is none of the rewards."""
    return score not in (JUDGE, PICKSCORE, *rewards)


class Past(NamedTuple):
    """An evaluation of the run, `merit`: what the best one has most of; wrong: as this file's head says."""

    iteration: int
    merit: float
    wrong: bool


class Monitor:
    """Measures the policy on the first held-out prompts every `evaluate.every` iterations, always from the same noise.

    stopped: whether the run is to end. columns: what `measure` reports.
    """

    def __init__(self, evaluator: Evaluator, base: Evaluation, config: EvaluateConfig, run_dir: Path):
        """base: the evaluation of the base model, on all prompts."""
        self.evaluator, self.config, self.run_dir = evaluator, config, run_dir
        self.base = base.first(max(config.watched, evaluator.ranks.size))
        self.scores = tuple(base.scores)
        self.past: list[Past] = []
        self.stopped = False
        labels = (self.scores, self.scores, DRIFT, ())
        self.columns = [replace(column, labels=names) for column, names in zip(COLUMNS, labels, strict=True)]

    def replay(self, records: Sequence[dict]) -> None:
        """Takes up the evaluations of a resumed run from its records."""
        self.past = [
            Past(record["iteration"], self._merit(record[CHANGE.name]), bool(record[WRONG.name]))
            for record in records
            if record.get(CHANGE.name) and record.get(WRONG.name) is not None
        ]

    def measure(self, done: int) -> dict[str, Value]:
        """Returns measurements after `done` iterations, {} where none are due. A collective call."""
        if done == 0 or done % self.config.every:
            return {}
        tuned = self.evaluator(f"model after iteration {done}", len(self.base))
        change = {name: self._change(name, tuned) for name in self.scores}
        moved = drift(self.base.statistics, tuned.statistics)
        reasons = self._reasons(tuned, moved)
        self.past.append(Past(done, self._merit(change), bool(reasons)))
        if self.evaluator.ranks.first:
            save_grid(tuned.images, self.run_dir / "samples" / f"{done:06d}.png")
        self._judge_the_run(reasons)
        return {
            HELDOUT.name: torch.tensor([tuned.scores[name].mean() for name in self.scores]),
            CHANGE.name: torch.tensor([change[name] for name in self.scores]),
            STRAYED.name: moved,
            WRONG.name: float(bool(reasons)),
        }

    @property
    def best(self) -> int | None:
        """The iteration of the best evaluation; the first one if all were wrong, None if there was none."""
        right = [past for past in self.past if not past.wrong] or self.past[:1]
        return max(right, key=lambda past: (past.merit, past.iteration)).iteration if right else None

    def _independent(self) -> list[str]:
        return [name for name in self.scores if independent_of_judge(name, self.evaluator.rewards)]

    def _change(self, name: str, tuned: Evaluation) -> float:
        before = self.base.scores[name]
        return ((tuned.scores[name].mean() - before.mean()) / before.std().clamp(min=1e-6)).item()

    def _merit(self, change: dict[str, float | None]) -> float:
        independent = [change[name] for name in self._independent() if change.get(name) is not None]
        return sum(independent) / len(independent) if independent else change[JUDGE] or 0.0

    def _reasons(self, tuned: Evaluation, moved: Tensor) -> str:
        """Says what is wrong with an evaluation; nothing if it is not."""
        rows = {name: paired_delta(self.base.scores[name], tuned.scores[name]) for name in self.scores}
        direction = beyond_chance(rows)
        independent = self._independent()
        if fell := [name for name in independent if direction[name] < 0]:
            return f"{' and '.join(fell)} fell"
        pleased = any(direction[name] > 0 for name in (JUDGE, *self.evaluator.rewards))
        drifted = dict(zip(DRIFT, moved.tolist(), strict=True))
        out = strayed(drifted) if pleased and not any(direction[name] > 0 for name in independent) else []
        return f"the judge's score rose and the pictures strayed from the base's in {' and '.join(out)}" if out else ""

    def _judge_the_run(self, reasons: str) -> None:
        patience = self.config.patience
        last = self.past[-patience:]
        if len(last) < patience or not all(past.wrong for past in last):
            return
        self.stopped = self.config.stop
        first_time = len(self.past) == patience or not self.past[-patience - 1].wrong
        if self.evaluator.ranks.first and (first_time or self.stopped):
            end = "the run ends here" if self.stopped else "evaluate.stop=true would end the run"
            warn(
                f"evaluate.patience: {reasons} in {patience} evaluations in a row; the best was that after iteration "
                f"{self.best}, and {end}"
            )


def save_grid(images: Tensor, path: Path, columns: int = 4) -> None:
    """Writes images (N, 3, H, W) in [-1, 1] to a PNG, row by row in the order of the prompts."""
    tiles = pil_images(images)
    width, height = tiles[0].size
    canvas = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place % columns * width, place // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
