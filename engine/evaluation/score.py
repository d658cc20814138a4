"""Second phase of an evaluation: the scores of all images, scorer by scorer, each score kept as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..scorers.find import load_scorer, scores_by
from .draw import Work
from .images import Batch
from .progress import Progress

KEY = "--scorers"
ROW = {"scorer", "system", "number", "seed", "scores"}
Image = tuple[str, int, int]  # system, prompt number, seed


@dataclass
class ScoreLog:
    """Scores as they come, in files that only grow: DIR/parts/<rank>.jsonl, a line for each image and scorer."""

    folder: Path
    rank: int
    scores: dict[str, dict[Image, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, rank: int) -> ScoreLog:
        """Reads what all ranks of all earlier starts have left; a last line that was cut off does not count."""
        log = cls(folder, rank)
        for file in sorted(folder.glob("*.jsonl")):
            lines = file.read_bytes().decode(errors="replace").split("\n")
            for row in filter(None, map(_parsed, lines)):
                image = row["system"], row["number"], row["seed"]
                log.scores.setdefault(row["scorer"], {})[image] = row["scores"]
        return log

    def has(self, scorer: str, system: str, batch: Batch) -> bool:
        """Whether every image of a batch has its scores by a scorer."""
        known = self.scores.get(scorer, {})
        return all((system, number, batch.seed) in known for number in batch.numbers)

    def add(self, scorer: str, system: str, batch: Batch, values: dict[str, list[float]]) -> None:
        """Keeps the scores of a batch: values[name][i] of its i-th image."""
        lines = []
        for i, number in enumerate(batch.numbers):
            scores = {name: column[i] for name, column in values.items()}
            self.scores.setdefault(scorer, {})[system, number, batch.seed] = scores
            row = {"scorer": scorer, "system": system, "number": number, "seed": batch.seed, "scores": scores}
            lines.append(json.dumps(row))
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.rank}.jsonl"
        with file.open("a", encoding="utf-8") as opened:
            opened.write("\n" + "\n".join(lines) + "\n")  # begins a new line, also after one that was cut off


def _parsed(line: str) -> dict | None:
    """Returns the row of a line; None for one that is empty or was cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() == ROW else None


def score(scorers: Sequence[str], systems: Sequence[str], work: Work, log: ScoreLog, progress: Progress) -> None:
    """Scores the images that have no scores yet; one scorer is in memory at a time. Raises UserError for a bad one."""
    for spec in scorers:
        todo = missing(spec, systems, work, log)
        if not todo:
            continue
        scorer = load_scorer(spec, KEY, work.device)
        name = spec.partition("=")[0].rpartition(":")[0].rpartition(".")[2] or spec.partition("=")[0]
        with progress.stage(f"scoring by {name}", sum(len(batch.numbers) for _, batch in todo), "images") as done:
            for system, batch in todo:
                prompts = [work.prompts[number] for number in batch.numbers]
                images = work.images.read(system, batch).to(work.device)
                log.add(spec, system, batch, scores_by(scorer, images, prompts, spec, KEY))
                done(len(prompts))


def missing(scorer: str, systems: Sequence[str], work: Work, log: ScoreLog) -> list[tuple[str, Batch]]:
    """Returns the systems and batches that a scorer has not scored."""
    return [(system, batch) for system in systems for batch in work.batches if not log.has(scorer, system, batch)]


def check_scorers(scorers: Sequence[str], systems: Sequence[str], work: Work, log: ScoreLog) -> None:
    """Loads each scorer that is still needed and lets it go, so that an unfit file shows before hours of drawing.

    It does nothing where everything is drawn: `score` then loads them at once, and what others have scored is kept.
    """
    drawn = all(work.images.has(system, batch) for system in systems for batch in work.batches)
    for spec in () if drawn else scorers:
        if missing(spec, systems, work, log):
            load_scorer(spec, KEY, work.device)
