"""Scores both images of labelled pairs: by how much the preferred one is ahead, by each score.

data/pair_filter.py decides by these gaps which pairs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data.pair_files import BrokenPair, PairSource, resized
from ..data.pair_scan import rows_of_worker
from ..errors import UserError
from ..runtime.stop import ignore_signals
from .find import is_factory, scores_by

KEY = "--scorers"
Pair = tuple[int, list[Image.Image], str]  # row, both images, or none of them and why the pair is broken


@dataclass(frozen=True, slots=True)
class PairScorer:
    """Scores pairs of a source.

    scorers: by their specs; device: theirs. batch: pairs that are scored at a time; workers: processes that read.
    """

    source: PairSource
    scorers: Mapping[str, Callable[..., dict[str, Tensor]]]
    device: torch.device
    batch: int
    workers: int

    def entries(self, rows: Sequence[int]) -> Iterator[list[dict]]:
        """Yields, some pairs at a time, {"row", "gaps"} of all rows, or {"row", "broken"} of those that are no pairs.

        gaps: of each score, by its name, that of the preferred image minus the other's, of a tie the first image's
        minus the second's; to six digits. Raises UserError for scores that cannot be used.
        """
        loader = DataLoader(
            _PairReader(self.source, rows), batch_size=None, num_workers=self.workers, worker_init_fn=ignore_signals
        )
        whole, broken = [], []
        for row, images, why in loader:
            if why:
                broken.append({"row": row, "broken": why})
            else:
                whole.append((row, images))
            if len(whole) == self.batch or len(broken) == self.batch:
                yield self._scored(whole) + broken
                whole, broken = [], []
        yield self._scored(whole) + broken

    def _scored(self, pairs: list[tuple[int, list[Image.Image]]]) -> list[dict]:
        rows = [row for row, _ in pairs]
        images = [images[side] for side in (0, 1) for _, images in pairs]  # 2N
        prompts = [self.source.captions[row] for row in rows] * 2
        entries = [{"row": row, "gaps": {}} for row in rows]
        for spec in self.scorers if rows else ():
            for name, scores in self._scores(spec, images, prompts).items():
                for i, entry in enumerate(entries):
                    if name in entry["gaps"]:
                        raise UserError(f"{KEY}: {spec} gives {name}, which another scorer gives too")
                    gap = scores[i] - scores[len(rows) + i]
                    first, second = self.source.labels[entry["row"]]
                    entry["gaps"][name] = float(f"{gap if first >= second else -gap:.6g}")
        return entries

    def _scores(self, spec: str, images: list[Image.Image], prompts: list[str]) -> dict[str, list[float]]:
        """Returns scores by name; code of a user's gets tensors, as in an evaluation, those of one size at a time."""
        scorer = self.scorers[spec]
        if not is_factory(spec):
            return scores_by(scorer, images, prompts, spec, KEY)
        scores: dict[str, list[float]] = {}
        for width, height in dict.fromkeys(image.size for image in images):
            alike = [i for i, image in enumerate(images) if image.size == (width, height)]
            stacked = torch.stack([resized(images[i], height, width) for i in alike]).to(self.device)  # (M, 3, H, W)
            for name, part in scores_by(scorer, stacked, [prompts[i] for i in alike], spec, KEY).items():
                column = scores.setdefault(name, [float("nan")] * len(images))
                for i, score in zip(alike, part, strict=True):
                    column[i] = score
        return scores


class _PairReader(IterableDataset):
    """Reads the images of rows, in groups of rows that lie together; a worker reads whole groups."""

    def __init__(self, source: PairSource, rows: Sequence[int]):
        self.source = source
        self.groups = [list(group) for _, group in groupby(rows, key=source.group)]

    def __iter__(self) -> Iterator[Pair]:
        return map(self._read, rows_of_worker(self.groups))

    def _read(self, row: int) -> Pair:
        try:
            return row, self.source.images(row), ""
        except BrokenPair as broken:
            return row, [], str(broken)
