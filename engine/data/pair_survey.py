"""The pass over preference pairs before training: which are broken, and what is computed of each pair once.

That is the VAE's posterior of both images, PickScore's scores where they make the labels, and the text embeddings of
each caption. They go to the cache; without one every image is looked at all the same, so that a run of a day does not
end at a broken file. Every rank takes its share. Text embeddings and posteriors are kept in float16.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from ..judge.denoiser import Denoiser
from ..judge.model import StepAwarePreferenceModel
from ..models.latent_diffusion import LatentDiffusion
from ..runtime.progress import duration
from ..runtime.ranks import Ranks
from .pair_cache import PairCache, fingerprint
from .pair_files import BrokenPair, PairSource, fitted

CAPTIONS_AT_ONCE = 1024
SECONDS_PER_LINE = 10
MODULATION = ("adaLN_modulation", "t_embedder")  # what a judge has beyond the CLIP beneath it


@dataclass(frozen=True, slots=True)
class Entries:
    """Which entry of the cache belongs to what: the names hold the weights of the models that make them."""

    cache: PairCache
    vae: str
    encoders: str
    judge: str

    @classmethod
    def of(cls, cache: PairCache, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel | None) -> Entries:
        """Hashes the models' weights as they are loaded: seconds for those of full size. judge: where it scores."""
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in diffusion.tokenizers]
        return cls(
            cache,
            fingerprint([diffusion.vae]),
            fingerprint(diffusion.text_encoders, vocabularies),
            fingerprint([judge.clip], leave_out=MODULATION) if judge else "",
        )

    def latents(self, source: PairSource, row: int, size: tuple[int, int]) -> Path:
        return self.cache.path("latents", self.vae, size, source.identity(row))

    def scores(self, source: PairSource, row: int) -> Path:
        return self.cache.path("scores", self.judge, source.captions[row], source.identity(row))

    def text(self, caption: str) -> Path:
        return self.cache.path("text", self.encoders, caption)


@dataclass(frozen=True, slots=True)
class Surveyor:
    """What the pass is to find out, and with what.

    size: (height, width) of the images. entries: None without a cache. scored: PickScore's scores are wanted.
    """

    denoiser: Denoiser
    judge: StepAwarePreferenceModel
    size: tuple[int, int]
    entries: Entries | None
    scored: bool
    batch: int
    workers: int
    ranks: Ranks

    def survey(self, source: PairSource, rows: Sequence[int], key: str, max_broken: float, encode: bool) -> Survey:
        """Looks at rows of a source, each rank at its share of them.

        key: where in the configuration the source stands. encode: whether the VAE's posteriors go to the cache. Raises
        UserError where more than the share max_broken of the rows is broken.
        """
        groups = [list(group) for _, group in groupby(rows, key=source.group)][self.ranks.rank :: self.ranks.size]
        found, pace = Survey(), Pace(f"{key}: pairs", sum(map(len, groups)), self.ranks.first)
        looks = DataLoader(_Looks(self, source, groups, encode), batch_size=None, num_workers=self.workers)
        waiting = []
        for look in looks:
            if "broken" in look:
                found.broken.append(look["broken"])
                if len(found.broken) > max_broken * len(rows):
                    break
            else:
                found.scores[look["row"]] = look.get("scores")
                waiting += [look] if look.keys() & {"images", "small"} else []
            if len(waiting) == self.batch:
                self._compute(waiting, source, found)
                waiting = []
            pace.step()
        if waiting:
            self._compute(waiting, source, found)
        found = _together(found, self.ranks)
        refuse_too_many(found.broken, len(rows), key, max_broken)
        return found

    def encode_captions(self, captions: Sequence[str]) -> None:
        """Puts the text embeddings of these captions into the cache, those that it lacks."""
        mine = sorted(set(captions))[self.ranks.rank :: self.ranks.size]
        pace = Pace("captions", len(mine), self.ranks.first)
        for begin in range(0, len(mine), CAPTIONS_AT_ONCE):
            some = mine[begin : begin + CAPTIONS_AT_ONCE]
            lacking = [caption for caption in some if self.entries.cache.read(self.entries.text(caption)) is None]
            if lacking:
                cond = self.denoiser.diffusion.encode(lacking)
                for row, caption in enumerate(lacking):
                    entry = {"text": cond.text[row].half()}
                    if cond.pooled is not None:
                        entry["pooled"] = cond.pooled[row].half()
                    self.entries.cache.write(self.entries.text(caption), entry)
            pace.step(len(some))
        if self.ranks.size > 1:
            dist.barrier()

    @torch.no_grad()
    def _compute(self, looks: list[dict], source: PairSource, found: Survey) -> None:
        """Posteriors and scores of the pairs that lack them, in one batch each."""
        images = [look for look in looks if "images" in look]
        if images:
            pixels = torch.stack([look["images"] for look in images], dim=1).to(self.ranks.device)  # (2, N, 3, H, W)
            mean, std = (part.half().cpu() for part in self.denoiser.posterior(pixels))  # (2, N, C, h, w)
            for at, look in enumerate(images):
                path = self.entries.latents(source, look["row"], self.size)
                self.entries.cache.write(path, {"mean": mean[:, at], "std": std[:, at]})
        small = [look for look in looks if "small" in look]
        if small:
            text = self.judge.encode([source.captions[look["row"]] for look in small])
            pixels = torch.stack([look["small"] for look in small], dim=1).to(self.ranks.device)  # (2, N, 3, S, S)
            pixels = ((pixels / 2 + 0.5 - self.judge.mean) / self.judge.std).flatten(0, 1)
            scores = self.judge.compare(pixels, text.repeat(2, 1), torch.zeros(1, device=self.ranks.device))
            for look, pair in zip(small, scores.view(2, -1).T.cpu(), strict=True):
                found.scores[look["row"]] = pair.tolist()
                if self.entries:
                    self.entries.cache.write(self.entries.scores(source, look["row"]), {"scores": pair})


@dataclass(slots=True)
class Survey:
    """Which rows are whole, with PickScore's scores of both images where they are wanted, and which are broken."""

    scores: dict[int, list[float] | None] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class _Looks(IterableDataset):
    """What there is to do of each row: its images as tensors where something of them is not in the cache.

    Yields {"row"} and "images" (2, 3, H, W), "small" (2, 3, S, S), "scores" (2,) or "broken". A worker takes whole
    groups of rows.
    """

    def __init__(self, surveyor: Surveyor, source: PairSource, groups: list[list[int]], encode: bool):
        self.entries, self.size, self.scored = surveyor.entries, surveyor.size, surveyor.scored
        self.small = surveyor.judge.size
        self.source, self.encode, self.groups = source, encode, groups

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        mine = self.groups[worker.id :: worker.num_workers] if worker else self.groups
        for rows in mine:
            for row in rows:
                yield {"row": row} | self._or_broken(row)

    def _or_broken(self, row: int) -> dict:
        try:
            return self._look(row)
        except BrokenPair as broken:
            return {"broken": str(broken)}

    def _look(self, row: int) -> dict:
        look, kept = {}, self.entries.cache if self.entries else None
        encode = self.encode and kept and kept.read(self.entries.latents(self.source, row, self.size)) is None
        known = kept.read(self.entries.scores(self.source, row)) if kept and self.scored else None
        if known is not None:
            look["scores"] = known["scores"].tolist()
        if kept and self.encode and not encode and (known is not None or not self.scored):
            return look  # whole, as its entry was made of it
        images = self.source.images(row)
        if encode:
            look["images"] = torch.stack([fitted(image, *self.size) for image in images])
        if self.scored and known is None:
            look["small"] = torch.stack([fitted(image, self.small, self.small) for image in images])
        return look


class Pace:
    """Says on the terminal, now and then, how far a pass is."""

    def __init__(self, title: str, total: int, enabled: bool):
        self.title, self.total, self.enabled = title, total, enabled
        self.done, self.begun = 0, time.monotonic()
        self.said = self.begun

    def step(self, count: int = 1) -> None:
        """Counts items done."""
        self.done += count
        now = time.monotonic()
        if self.enabled and now - self.said > SECONDS_PER_LINE:
            self.said, rate = now, self.done / (now - self.begun)
            left = duration((self.total - self.done) / rate)
            print(f"{self.title} {self.done:,}/{self.total:,}, {rate:.1f} a second, ETA {left}", flush=True)


def refuse_too_many(broken: Sequence[str], total: int, key: str, max_broken: float) -> None:
    """Raises UserError where more than the share max_broken of `total` pairs is broken."""
    if len(broken) > max_broken * total:
        raise UserError(
            f"{key}: at least {len(broken)} of {total} pairs are broken, which is more than data.max_broken = "
            f"{max_broken:g}; the first is {broken[0]}"
        )


def pickscore_labels(scores: Tensor, tie: float) -> Tensor:
    """Labels (2, N) of PickScore's scores (2, N): the preferred one has p = softmax(scores) more than `tie` above.

    The others are ties. Source: the published SPMTask.update_as_pickscore_label.
    """
    gap = scores.softmax(0).diff(dim=0).neg()  # (1, N), p_0 - p_1
    first = torch.where(gap > tie, 1.0, torch.where(gap < -tie, 0.0, 0.5))
    return torch.cat([first, 1 - first])


def _together(mine: Survey, ranks: Ranks) -> Survey:
    """What all ranks found."""
    parts = [mine] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(parts, mine)
    scores = {row: pair for part in parts for row, pair in part.scores.items()}
    return Survey(dict(sorted(scores.items())), [line for part in parts for line in part.broken])
