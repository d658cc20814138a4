"""Answers as preference pairs for the training of a judge, in the .jsonl form of ../data/pair_files.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..data.pair_files import open_source
from ..errors import UserError
from ..runtime.output import write_all
from .answers import Answers
from .balance import PAIR
from .key import Key

LABELS = {"left": (1.0, 0.0), "tie": (0.5, 0.5), "right": (0.0, 1.0)}


def write_pairs(key: Key, answers: Answers, question: str, images: Path, out: Path) -> tuple[int, int]:
    """Writes a line for each answer of each rater to `question`; returns how many there are, and how many are ties.

    A tie has the labels 0.5 and 0.5; image_0 is the one that stood on the left. Repeats and sentinels are left out.
    images: the folder of the blinded images, to which the lines point relative to `out`. Raises UserError where an
    image is missing or the file does not load as pairs.
    """
    lines, ties = [], 0
    for vote in answers.of_kind(PAIR):
        item = vote.item
        files = [images / key.images[item.prompt, system] for system in (item.left, item.right)]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"--images: found no image {missing[0]}; expected the folder page/images of the study")
        paths = [os.path.relpath(file, out.parent) for file in files]
        labels = LABELS[vote.sides[question]]
        ties += labels[0] == 0.5
        line = {"image_0": paths[0], "image_1": paths[1], "caption": key.prompts[item.prompt]}
        lines.append(line | {"label_0": labels[0], "label_1": labels[1], "rater": vote.rater})
    if not lines:
        raise UserError(
            "study pairs: found no answer to a pair in these files; expected those of raters who have begun"
        )
    write_all({out: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)})
    source = open_source(str(out), "--out", labelled=True)
    if source.broken or len(source) != len(lines):
        raise UserError(f"--out: {out} does not load as pairs: {source.broken[:1]}")
    return len(lines), ties
