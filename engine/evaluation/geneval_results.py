"""Results of GenEval's official script: read back, checked for completeness, as task means with intervals, and paired.

Images of one prompt are not independent, so a prompt with its images is the unit everywhere here. A task's score is the
mean of its images, as the official summary has it, and Overall the mean of the task scores, not of images.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from ..data.json_lines import read_objects
from ..errors import UserError
from ..runtime.signs import listed
from .geneval import OFFICIAL, TASKS, Prompt
from .intervals import ENOUGH, SURE, Z, corrected, wilson

FORMAT = "strop-geneval/1"
FLIPS = 20_000
OVERALL = "overall"

Cells = dict[str, dict[str, dict[str, bool]]]  # task -> prompt -> image -> whether it is correct


@dataclass(frozen=True, slots=True)
class Results:
    """One results file: which images are correct, and in what it falls short of being complete, as sentences."""

    name: str
    cells: Cells
    faults: list[str]

    @property
    def tasks(self) -> list[str]:
        """The tasks that have results, in GenEval's order."""
        return [task for task in TASKS if task in self.cells]


def read_results(path: Path, prompts: Sequence[Prompt] | None = None) -> Results:
    """Reads a results file and compares it with what should be there: `prompts`, or GenEval's 553.

    Raises UserError that names file and line for a line that is not one of results, for a prompt that is not among
    `prompts`, and for an image that is both correct and not.
    """
    cells: Cells = {}
    folders, doubles = set(), []
    known = None if prompts is None else {(prompt.tag, prompt.text) for prompt in prompts}
    for line, row in read_objects(path, str(path), "results of GenEval's script"):
        where = f"{path}: line {line}"
        tag, text, name, correct = (row.get(key) for key in ("tag", "prompt", "filename", "correct"))
        if tag not in TASKS:
            raise UserError(f"{where}: found the tag {tag!r}, expected one of {', '.join(TASKS)}")
        if not isinstance(text, str) or not isinstance(name, str) or not isinstance(correct, bool):
            raise UserError(
                f"{where}: found filename {name!r}, prompt {text!r}, correct {correct!r}, expected two texts and true "
                "or false, as GenEval's script writes them"
            )
        if known is not None and (tag, text) not in known:
            raise UserError(f"{where}: found the prompt {text!r} ({tag}), which is not in the file of --metadata")
        images = cells.setdefault(tag, {}).setdefault(text, {})
        folder, image = re.search(r"(?:(\d+)/samples/)?([^/]*)$", name.replace("\\", "/")).groups()
        if image in images:
            doubles.append(name)
            if images[image] != correct:
                raise UserError(f"{where}: found {name!r} both correct and not; make the results anew")
        images[image] = correct
        folders.add(int(folder or -1))
    missing = _official_missing(cells, folders) if prompts is None else _missing(cells, prompts)
    return Results(path.stem, cells, [*missing, *_short_of_images(cells), *_doubles(doubles)])


def scores(results: Results) -> dict[str, dict]:
    """Returns by task, and as OVERALL, the score in [0, 1], its 95% interval, and how many prompts and images it has.

    A task's interval is Wilson's with the number of images that independent ones would have to be for the variance
    between prompts (Korn and Graubard, 1998, with Student's quantile), so that it holds near 0 and 1; that of the mean
    of tasks is made from theirs (MOVER: Zou and Donner, 2008). Intervals are None below ENOUGH prompts in a task.
    """
    rows = {task: _score(_counts(results.cells[task])) for task in results.tasks}
    return rows | {OVERALL: _mean_of(rows, "score")}


def compare(base: Results, tuned: Results) -> dict[str, dict]:
    """Returns by task, and as OVERALL, the change from base to tuned on the images that both have, paired by prompt.

    delta is in [-1, 1]. Its interval is Student's on the prompts' gains, with one prompt that gains an image and one
    that loses one added, which is Bonett and Price's (2012) where a prompt has one image. p is of sign flips of whole
    prompts; p_holm is corrected for the tasks, and Overall stands alone. Raises UserError unless the tasks are the same
    and have common images.
    """
    if base.tasks != tuned.tasks:
        raise UserError(
            f"found the tasks {', '.join(base.tasks)} in {base.name} and {', '.join(tuned.tasks)} in {tuned.name}, "
            "expected the same in both"
        )
    gains = {task: _gains(base, tuned, task) for task in base.tasks}
    rows = {task: _change(*gains[task]) for task in gains}
    adjusted = corrected(rows)
    every = np.concatenate([gain / images.sum() for gain, images in gains.values()])
    p = sign_flip_p(every) if len(adjusted) == len(rows) else None
    rows = {task: row | {"p_holm": adjusted.get(task)} for task, row in rows.items()}
    rows[OVERALL] = _mean_of(rows, "delta") | {"p": p, "p_holm": p}
    return {task: row | {"verdict": _verdict(row)} for task, row in rows.items()}


def sign_flip_p(gains: np.ndarray, draws: int = FLIPS) -> float:
    """Returns the two-sided p-value of the sum of gains (P,): how often it is as far from 0 with random signs.

    At least 1 / (draws + 1). The signs have a seed of their own, so that the same results give the same number.
    """
    gains = np.asarray(gains, dtype=np.float64)
    gains = gains[gains != 0]
    signs = np.random.default_rng(0).integers(0, 2, (draws, len(gains)), dtype=np.int8)
    sums = 2 * (signs @ gains) - gains.sum()
    return (1 + int((np.abs(sums) >= abs(gains.sum()) - 1e-9).sum())) / (draws + 1)


def _score(counts: np.ndarray) -> dict:
    """Returns a task's row from counts (P, 2): correct images and images of each prompt."""
    hits, images = counts.T
    total, prompts = images.sum(), len(images)
    score = float(hits.sum() / total)
    row = {"score": score, "prompts": prompts, "images": int(total), "ci95": None}
    if prompts < ENOUGH:
        return row
    variance = prompts / (prompts - 1) * ((hits - score * images) ** 2).sum() / total**2
    fewest = total**2 / (images**2).sum()  # as if the images of one prompt were one
    independent = score * (1 - score) / variance if variance else total
    size = min(max(independent, fewest), total) if 0 < score < 1 else fewest
    return row | {"ci95": wilson(score, float(size) * (Z / float(stdtrit(prompts - 1, 0.975))) ** 2)}


def _change(gains: np.ndarray, images: np.ndarray) -> dict:
    """Returns a task's row from gains (P,) in images, and how many images (P,) the prompts have."""
    total, prompts = images.sum(), len(images)
    row = {"delta": float(gains.sum() / total), "prompts": prompts, "images": int(total), "ci95": None, "p": None}
    if prompts < ENOUGH:
        return row
    gains_and_two = np.concatenate([gains, [1, -1]])
    images_and_two = np.concatenate([images, [images.mean()] * 2])
    middle = gains_and_two.sum() / images_and_two.sum()
    error = math.sqrt(((gains_and_two - middle * images_and_two) ** 2).sum()) / images_and_two.sum()
    half = float(stdtrit(prompts - 1, 0.975)) * error
    interval = [max(-1.0, float(middle) - half), min(1.0, float(middle) + half)]
    return row | {"ci95": interval, "p": sign_flip_p(gains)}


def _mean_of(rows: Mapping[str, dict], key: str) -> dict:
    """Returns the mean of the tasks' `key`, with its interval where all of them have one."""
    tasks = list(rows.values())
    mean = sum(row[key] for row in tasks) / len(tasks)
    whole = {key: mean, **{what: sum(row[what] for row in tasks) for what in ("prompts", "images")}, "ci95": None}
    if any(row["ci95"] is None for row in tasks):
        return whole
    below, above = (math.hypot(*(row[key] - row["ci95"][end] for row in tasks)) / len(tasks) for end in (0, 1))
    return whole | {"ci95": [mean - below, mean + above]}


def _verdict(row: Mapping) -> str:
    if row["p_holm"] is None:
        return "too few prompts to say"
    if row["p_holm"] >= SURE or not row["delta"]:
        return "no change is shown"
    return "rose" if row["delta"] > 0 else "fell"


def _counts(prompts: Mapping[str, Mapping[str, bool]]) -> np.ndarray:
    return np.array([(sum(images.values()), len(images)) for images in prompts.values()], dtype=np.float64)


def _gains(base: Results, tuned: Results, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (gains (P,), images (P,)) of a task's prompts of which both have images, by the names of these."""
    pairs = []
    for text, before in base.cells[task].items():
        after = tuned.cells[task].get(text, {})
        common = before.keys() & after.keys()
        if common:
            pairs.append((sum(after[name] - before[name] for name in common), len(common)))
    if not pairs:
        raise UserError(f"{tuned.name}: found no image of {task} that {base.name} has too, expected the same prompts")
    gains, images = np.array(pairs, dtype=np.float64).T
    return gains, images


def _missing(cells: Cells, prompts: Sequence[Prompt]) -> list[str]:
    missing = [prompt.text for prompt in prompts if prompt.text not in cells.get(prompt.tag, {})]
    return [_sentence(missing, f"missing prompts, of {len(prompts)}")] if missing else []


def _official_missing(cells: Cells, folders: set[int]) -> list[str]:
    """Compares counts, because the 553 prompts do not come with strop; the folders' numbers say which are missing."""
    counts = {task: len(cells.get(task, {})) for task in TASKS}
    wrong = [f"{task} {counts[task]} of {OFFICIAL[task]}" for task in TASKS if counts[task] != OFFICIAL[task]]
    if not wrong:
        return []
    gaps = [f"{number:05}" for number in sorted(set(range(sum(OFFICIAL.values()))) - folders)]
    named = f" (no folder {_first(gaps)})" if -1 not in folders and gaps else ""
    return [f"the prompts are not GenEval's {sum(OFFICIAL.values())}: {', '.join(wrong)}{named}"]


def _short_of_images(cells: Cells) -> list[str]:
    counts = {text: len(images) for prompts in cells.values() for text, images in prompts.items()}
    most = max(counts.values())
    short = [text for text, count in counts.items() if count < most]
    return [_sentence(short, f"prompts with fewer than {most} images, of {len(counts)}")] if short else []


def _doubles(names: Sequence[str]) -> list[str]:
    return [_sentence(list(Counter(names)), "images more than once, which count once")] if names else []


def _sentence(names: Sequence[str], what: str) -> str:
    return f"{what}: {len(names)} ({_first(names)})"


def _first(names: Sequence[str]) -> str:
    return listed([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])
