"""Scans preference pairs before training: finds broken pairs and caches what frozen models compute from each pair.

Cached are the VAE's posteriors of both images, of the flipped ones too if they are needed, and the text embeddings of
each caption, in float16, PickScore's scores if they make the labels, and how images are cropped if that is asked for.
Without a cache every image is still read, so that a run of a day does not end at a broken file. The rows are split over
the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config.judge_training import JudgeTrainingDataConfig
from ..errors import UserError
from ..judge.model import StepAwarePreferenceModel
from ..judge.pixels import resized_pixels
from ..models.latent_diffusion import LatentDiffusion
from ..runtime.progress import duration
from ..runtime.ranks import Ranks
from .pair_cache import PairCache, fingerprint
from .pair_files import BrokenPair, PairSource, frame, resized

PLAIN, FLIPPED = "latents", "flipped"  # entries: posteriors of images as they are, and flipped horizontally,
FRAMES = "frames"  # and the images' sizes and crops
CAPTION_BATCH = 1024
SECONDS_PER_LINE = 10
MODULATION = ("adaLN_modulation", "t_embedder")  # tensors that a judge has and its CLIP has not


@dataclass(frozen=True, slots=True)
class Entries:
    """Paths of the cache's entries, which depend on the weights of the models that compute them.

    vae, encoders, judge: fingerprints of those models; encoders is "" where no text is cached, judge where no score is.
    """

    cache: PairCache
    vae: str
    encoders: str
    judge: str

    @classmethod
    def of(
        cls,
        cache: PairCache,
        diffusion: LatentDiffusion,
        judge: StepAwarePreferenceModel | None = None,
        texts: bool = True,
    ) -> Entries:
        """Hashes the models' loaded weights, which takes seconds. judge: None unless it makes the labels."""
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in diffusion.tokenizers]
        return cls(
            cache,
            fingerprint([diffusion.vae]),
            fingerprint(diffusion.text_encoders, vocabularies) if texts else "",
            fingerprint([judge.clip], leave_out=MODULATION if judge.is_plain else ()) if judge else "",
        )

    def of_images(self, source: PairSource, row: int, size: tuple[int, int], kind: str = PLAIN) -> Path:
        """Returns the entry of a kind of a row's images at size (height, width): PLAIN, FLIPPED or FRAMES."""
        return self.cache.path(kind, "" if kind == FRAMES else self.vae, size, source.identity(row))

    def scores(self, source: PairSource, row: int) -> Path:
        """Returns the entry of PickScore's scores of a row's images."""
        return self.cache.path("scores", self.judge, source.captions[row], source.identity(row))

    def text(self, caption: str) -> Path:
        """Returns the entry of a caption's text embeddings."""
        return self.cache.path("text", self.encoders, caption)


@dataclass(frozen=True, slots=True)
class PairScan:
    """Checks pairs and fills the cache with the given models.

    judge: a PickScore whose scores are needed, or None. size: (height, width) of the images. entries: None without a
    cache. batch: pairs per forward; workers: processes that read images.
    """

    diffusion: LatentDiffusion
    judge: StepAwarePreferenceModel | None
    size: tuple[int, int]
    entries: Entries | None
    batch: int
    workers: int
    ranks: Ranks

    def scan(
        self, source: PairSource, rows: Sequence[int], key: str, max_broken: float, encode: Sequence[str] = ()
    ) -> ScanResult:
        """Scans rows of a source, split over the ranks; every rank returns the result of all rows.

        key: the configuration key of the source. encode: which are cached of PLAIN, FLIPPED and FRAMES.
        Raises UserError if more than the fraction max_broken of the rows is broken.
        """
        groups = [list(group) for _, group in groupby(rows, key=source.group)][self.ranks.rank :: self.ranks.size]
        result, progress = ScanResult(), ProgressLine(f"{key}: pairs", sum(map(len, groups)), self.ranks.first)
        reader = _PairReader(self, source, groups, encode)
        pending = []
        for pair in DataLoader(reader, batch_size=None, num_workers=self.workers):
            if "broken" in pair:
                result.broken.append(pair["broken"])
                if len(result.broken) > max_broken * len(rows):
                    break
            else:
                result.scores[pair["row"]] = pair.get("scores")
                pending += [pair] if pair.keys() & {"images", "small"} else []
            if len(pending) == self.batch:
                self._compute(pending, source, result)
                pending = []
            progress.step()
        if pending:
            self._compute(pending, source, result)
        result = _gathered(result, self.ranks)
        refuse_too_many(result.broken, len(rows), key, max_broken)
        return result

    def encode_captions(self, captions: Sequence[str]) -> None:
        """Computes the text embeddings of those captions that the cache lacks, split over the ranks."""
        rank_captions = sorted(set(captions))[self.ranks.rank :: self.ranks.size]
        progress = ProgressLine("captions", len(rank_captions), self.ranks.first)
        for begin in range(0, len(rank_captions), CAPTION_BATCH):
            batch = rank_captions[begin : begin + CAPTION_BATCH]
            missing = [caption for caption in batch if self.entries.cache.read(self.entries.text(caption)) is None]
            if missing:
                cond = self.diffusion.encode(missing)
                for row, caption in enumerate(missing):
                    entry = {"text": cond.text[row].half()}
                    if cond.pooled is not None:
                        entry["pooled"] = cond.pooled[row].half()
                    self.entries.cache.write(self.entries.text(caption), entry)
            progress.step(len(batch))
        if self.ranks.size > 1:
            dist.barrier()

    @torch.no_grad()
    def _compute(self, pairs: list[dict], source: PairSource, result: ScanResult) -> None:
        """Computes the posteriors and scores that pairs lack, in one batch each."""
        for pair in pairs:
            if FRAMES in pair.get("encode", ()):
                path = self.entries.of_images(source, pair["row"], self.size, FRAMES)
                self.entries.cache.write(path, {"frame": pair["frame"]})
        for kind in (PLAIN, FLIPPED):
            to_encode = [pair for pair in pairs if kind in pair.get("encode", ())]
            if to_encode:
                self._encode(to_encode, kind, source)
        to_score = [pair for pair in pairs if "small" in pair]
        if to_score:
            text = self.judge.encode([source.captions[pair["row"]] for pair in to_score])
            images = torch.stack([pair["small"] for pair in to_score], dim=1).to(self.ranks.device)  # (2, N, 3, S, S)
            pixels = resized_pixels(self.judge, images).flatten(0, 1)
            scores = self.judge.compare(pixels, text.repeat(2, 1), torch.zeros(1, device=self.ranks.device))
            for pair, both in zip(to_score, scores.view(2, -1).T.cpu(), strict=True):
                result.scores[pair["row"]] = both.tolist()
                if self.entries:
                    self.entries.cache.write(self.entries.scores(source, pair["row"]), {"scores": both})

    def _encode(self, pairs: list[dict], kind: str, source: PairSource) -> None:
        """Caches the posteriors of pairs in one forward for each side."""
        images = torch.stack([pair["images"] for pair in pairs], dim=1).to(self.ranks.device)  # (2, N, 3, H, W)
        images = images.flip(-1) if kind == FLIPPED else images
        mean, std = (part.half().cpu() for part in self.diffusion.posterior(images))  # (2, N, C, h, w)
        for i, pair in enumerate(pairs):
            path = self.entries.of_images(source, pair["row"], self.size, kind)
            self.entries.cache.write(path, {"mean": mean[:, i], "std": std[:, i]})


@dataclass(slots=True)
class ScanResult:
    """The rows that are whole, with PickScore's scores of both images or None, and "row: why" of the broken rows."""

    scores: dict[int, list[float] | None] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class _PairReader(IterableDataset):
    """Reads, for each row, the images from which something must be computed because the cache lacks it.

    It yields {"row"} with "images" (2, 3, H, W), "frame" (2, 4) and "encode", the kinds of entries to make of them,
    "small" (2, 3, S, S) for PickScore, "scores" (2,) from the cache, or "broken" (why). A worker reads whole groups.
    """

    def __init__(self, scan: PairScan, source: PairSource, groups: list[list[int]], encode: Sequence[str]):
        self.entries, self.size = scan.entries, scan.size
        self.judge_size = scan.judge.size if scan.judge else None
        self.source, self.encode, self.groups = source, encode, groups

    def __iter__(self) -> Iterator[dict]:
        return ({"row": row} | self._read_or_broken(row) for row in rows_of_worker(self.groups))

    def _read_or_broken(self, row: int) -> dict:
        try:
            return self._read(row)
        except BrokenPair as broken:
            return {"broken": str(broken)}

    def _read(self, row: int) -> dict:
        pair, cache = {}, self.entries.cache if self.entries else None
        place = self.source, row, self.size
        missing = [kind for kind in self.encode if cache.read(self.entries.of_images(*place, kind)) is None]
        scored = self.judge_size is not None
        cached_scores = cache.read(self.entries.scores(self.source, row)) if cache and scored else None
        if cached_scores is not None:
            pair["scores"] = cached_scores["scores"].tolist()
        if self.encode and not missing and (cached_scores is not None or not scored):
            return pair  # its images are whole, since the entry was computed from them
        images = self.source.images(row)
        if missing:
            pair["encode"] = missing
            pair["images"] = torch.stack([resized(image, *self.size) for image in images])
            pair["frame"] = torch.stack([frame(image, *self.size) for image in images])
        if scored and cached_scores is None:
            pair["small"] = torch.stack([resized(image, self.judge_size, self.judge_size) for image in images])
        return pair


def rows_of_worker(groups: list[list[int]]) -> Iterator[int]:
    """Yields the rows that this worker of a DataLoader reads, of whole groups; all of them outside of a worker."""
    worker = get_worker_info()
    return chain.from_iterable(groups[worker.id :: worker.num_workers] if worker else groups)


class ProgressLine:
    """Prints the progress of a scan on the terminal, at most every SECONDS_PER_LINE seconds."""

    def __init__(self, title: str, total: int, enabled: bool):
        self.title, self.total, self.enabled = title, total, enabled
        self.done, self.begun = 0, time.monotonic()
        self.printed = self.begun

    def step(self, count: int = 1) -> None:
        """Counts `count` more items as done."""
        self.done += count
        now = time.monotonic()
        if self.enabled and now - self.printed > SECONDS_PER_LINE:
            self.printed, rate = now, self.done / (now - self.begun)
            remaining = duration((self.total - self.done) / rate)
            print(f"{self.title} {self.done:,}/{self.total:,}, {rate:.1f} a second, ETA {remaining}", flush=True)


def refuse_too_many(
    broken: Sequence[str], total: int, key: str, max_broken: float, limit: str = "data.max_broken"
) -> None:
    """Raises UserError if more than the fraction max_broken, whose key is `limit`, of `total` pairs is broken."""
    if len(broken) > max_broken * total:
        raise UserError(
            f"{key}: at least {len(broken)} of {total} pairs are broken, which is more than {limit} = "
            f"{max_broken:g}; the first is {broken[0]}"
        )


def name_broken(broken: Sequence[str], run_dir: Path) -> None:
    """Writes broken.txt into the run folder and says so, if pairs are broken."""
    if broken:
        path = run_dir / "broken.txt"
        path.write_text("".join(f"{line}\n" for line in broken), encoding="utf-8")
        print(f"{len(broken):,} broken pairs left out, named in {path}, such as {broken[0]}")


def labels_by(scores: Tensor, data: JudgeTrainingDataConfig) -> Tensor:
    """Makes labels (2, N) from a judge's scores (2, N), by data.labels.

    Where that is `distilled`, they are the judge's probabilities. Where it is `pickscore`, an image wins if its
    probability is more than data.tie higher, and all other pairs are ties. Source of the latter: the published
    SPMTask.update_as_pickscore_label.
    """
    if data.labels == "distilled":
        return scores.softmax(0)
    tie = data.tie
    gap = scores.softmax(0).diff(dim=0).neg()  # (1, N), p_0 - p_1
    first = torch.where(gap > tie, 1.0, torch.where(gap < -tie, 0.0, 0.5))
    return torch.cat([first, 1 - first])


def _gathered(rank_result: ScanResult, ranks: Ranks) -> ScanResult:
    """Merges the results of all ranks."""
    parts = [rank_result] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(parts, rank_result)
    scores = {row: pair for part in parts for row, pair in part.scores.items()}
    return ScanResult(dict(sorted(scores.items())), [line for part in parts for line in part.broken])
