"""Builds the pairs that section `data` of a recipe names: those to train a judge on, and those held out from it.

Pairs come from a folder of Pick-a-Pic parquet files, a .jsonl file, or code (module:factory), whose pairs are used as
they are and never cached. pair_files.py reads files; pair_scan.py checks and caches pairs before training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config.factory import resolve
from ..config.judge_training import JudgeTrainingConfig, JudgeTrainingDataConfig
from ..config.pairs import PairsConfig
from ..errors import UserError
from ..judge.latent import LatentJudge
from ..judge.model import StepAwarePreferenceModel
from ..models.latent_diffusion import LatentDiffusion
from ..runtime.ranks import Ranks
from .pair_cache import PairCache
from .pair_files import PairSource, frame, is_factory, open_source, resized
from .pair_filter import kept_of
from .pair_scan import FLIPPED, FRAMES, PLAIN, Entries, PairScan, labels_by, refuse_too_many


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Some rows of a source, the configuration key that names it, and how many others data.only does not keep."""

    source: PairSource
    rows: list[int]
    key: str
    filtered: int = 0


@dataclass(frozen=True, slots=True)
class PairSets:
    """The training pairs and the held-out pairs of a run.

    broken: "file row: why" of pairs that could not be used. left_out: how many rows have no label, equal images or a
    caption of data.heldout_source; filtered: how many pairs data.only does not keep. cached: the training pairs come
    from the cache, not as images.
    """

    train: Dataset
    heldout: Dataset
    broken: list[str] = field(default_factory=list)
    left_out: int = 0
    filtered: int = 0
    cached: bool = False


class FilePairs(Dataset):
    """A Dataset of pairs from files; an item is {caption, label_0, label_1, num_examples} and more.

    With images=True it has image_0, image_1 (3, H, W) in [-1, 1]. With entries it has, in float16 from the cache, mean
    and std (2, C, h, w) of the VAE's posteriors and, if it is cached, text (L, D) and what the UNet takes of it beside,
    pooled (P). `more` may ask for
    FLIPPED: flipped_mean, flipped_std; and for FRAMES: frame (2, 4), as pair_files.frame has it of each image.
    """

    def __init__(
        self,
        source: PairSource,
        labels: dict[int, Sequence[float]],
        size: tuple[int, int],
        images: bool,
        entries: Entries | None = None,
        more: Sequence[str] = (),
    ):
        """Chooses the rows of `labels`, which has the labels by row. size: (height, width) of the images."""
        self.source, self.rows, self.labels = source, list(labels), list(labels.values())
        self.size, self.images, self.entries, self.more = size, images, entries, more

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row, labels = self.rows[i], self.labels[i]
        pair = {"caption": self.source.captions[row], "num_examples": self.source.num_examples[row]}
        pair |= {"label_0": float(labels[0]), "label_1": float(labels[1])}
        if self.images:
            images = self.source.images(row)
            pair |= {f"image_{side}": resized(image, *self.size) for side, image in enumerate(images)}
            if FRAMES in self.more:
                pair["frame"] = torch.stack([frame(image, *self.size) for image in images])
        if self.entries:
            place = self.source, row, self.size
            pair |= self._entry(self.entries.of_images(*place))
            pair |= self._entry(self.entries.text(pair["caption"])) if self.entries.encoders else {}
            pair |= self._entry(self.entries.of_images(*place, FRAMES)) if FRAMES in self.more else {}
            if FLIPPED in self.more:
                flipped = self._entry(self.entries.of_images(*place, FLIPPED))
                pair |= {f"flipped_{name}": value for name, value in flipped.items()}
        return pair

    def _entry(self, path: Path) -> dict[str, Tensor]:
        entry = self.entries.cache.read(path)
        if entry is None:
            raise UserError(f"data.cache: {path} was whole when the run began and is not now; start again")
        return entry


@dataclass(frozen=True, slots=True)
class RelabelledPairs(Dataset):
    """Pairs that code made, with other labels (2, n)."""

    pairs: Dataset
    labels: Tensor

    @classmethod
    def of(
        cls, pairs: Dataset, labeller: StepAwarePreferenceModel, data: JudgeTrainingDataConfig, batch: int
    ) -> RelabelledPairs:
        """Labels all pairs by the scores of a judge of images at t = 0, `batch` of them at once."""
        scores = []
        for rows in DataLoader(pairs, batch_size=batch, num_workers=data.workers):
            images = torch.stack([rows["image_0"], rows["image_1"]]).to(labeller.device)
            scores.append(labeller.score_images(images, labeller.encode(rows["caption"]), 0).cpu())
        return cls(pairs, labels_by(torch.cat(scores, dim=1), data))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        first, second = self.labels[:, i].tolist()
        return self.pairs[i] | {"label_0": first, "label_1": second}


def choose(config: JudgeTrainingConfig, ranks: Ranks) -> tuple[ChosenRows, ChosenRows] | None:
    """Chooses the rows to train on and the held-out rows; None for pairs made by code.

    No caption is on both sides. Raises UserError if the data is not what the recipe says.
    """
    data = config.data
    if is_factory(data.source):
        _check_factory(config, ranks)
        return None
    labelled = data.labels == "given"
    train = open_pairs(data.source, "data.source", labelled or data.only is not None, data.max_broken)
    if data.heldout_source is None:
        rows, heldout_rows = split_by_caption(train.captions, data.heldout, config.run.seed)
        heldout = ChosenRows(train, heldout_rows, "data.source")
    else:
        source = open_pairs(data.heldout_source, "data.heldout_source", labelled, data.max_broken)
        heldout = ChosenRows(source, list(range(min(len(source), data.heldout))), "data.heldout_source")
        heldout_captions = {source.captions[row] for row in heldout.rows}
        rows = [row for row, caption in enumerate(train.captions) if caption not in heldout_captions]
        train.left_out += len(train) - len(rows)
    kept = kept_of(rows, train, data) if rows else rows
    if not rows or len(heldout.rows) < ranks.size:
        raise UserError(
            f"{heldout.key}: found {len(rows)} pairs to train on and {len(heldout.rows)} held-out ones with other "
            f"captions, expected at least 1 and {ranks.size} (the processes); data.heldout says how many are held out"
        )
    used = config.optim.steps * config.optim.accumulate * config.optim.batch * ranks.size
    drawn = draw_rows(kept, min(used, data.train or used), config.run.seed)
    return ChosenRows(train, drawn, "data.source", len(rows) - len(kept)), heldout


def draw_rows(rows: Sequence[int], most: int, seed: int) -> list[int]:
    """Draws `most` of the rows by the seed, or takes all where there are fewer; in their order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in sorted(order[:most].tolist())]


def split_by_caption(captions: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into those to train on and `count` held-out ones, with no caption on both sides, drawn by seed."""
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows_of.setdefault(caption, []).append(row)
    groups = list(rows_of.values())
    heldout: list[int] = []
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    while order and len(heldout) < count:
        heldout += groups[order.pop(0)]
    return sorted(row for group in order for row in groups[group]), sorted(heldout[:count])


def make_sets(
    config: JudgeTrainingConfig,
    chosen: tuple[ChosenRows, ChosenRows] | None,
    diffusion: LatentDiffusion,
    labeller: StepAwarePreferenceModel | None,
    ranks: Ranks,
) -> PairSets:
    """Scans the chosen pairs and builds the data sets. Every rank must call it.

    labeller: makes the labels; None where they are given.
    """
    data, seed = config.data, config.run.seed
    if chosen is None:
        spec = data.heldout_source or data.source
        train = load_pairs(resolve(data.source, "data.source"), data.source, seed, data.train)
        heldout = load_pairs(resolve(spec, "data.heldout_source"), spec, seed + 1, data.heldout)
        if labeller:
            train, heldout = (
                RelabelledPairs.of(pairs, labeller, data, config.optim.batch) for pairs in (train, heldout)
            )
        return PairSets(train, heldout)
    entries = cache_entries(data, config.run.dir, diffusion, labeller, texts=config.judge.kind != LatentJudge.kind)
    size = diffusion.image_size
    pair_scan = PairScan(diffusion, labeller, size, entries, config.optim.batch, data.workers, ranks)
    sets, broken = [], []
    for part, encode in zip(chosen, (entries is not None, False), strict=True):
        result = pair_scan.scan(part.source, part.rows, part.key, data.max_broken, (PLAIN,) if encode else ())
        broken += result.broken
        labels = {row: part.source.labels[row] for row in result.scores}
        if labeller:
            rows, scores = list(result.scores), torch.tensor(list(result.scores.values())).T  # (2, N)
            labels = dict(zip(rows, labels_by(scores, data).T.tolist(), strict=True))
        clean = config.optim.clean_share > 0
        sets.append(FilePairs(part.source, labels, size, not encode or clean, entries if encode else None))
    train, heldout = chosen
    if entries and entries.encoders:
        pair_scan.encode_captions([train.source.captions[row] for row in sets[0].rows])
    sources = [train.source] if heldout.source is train.source else [train.source, heldout.source]
    broken += [line for source in sources for line in source.broken]
    left_out = sum(source.left_out for source in sources)
    return PairSets(*sets, broken, left_out, train.filtered, entries is not None)


def load_pairs(factory: Callable[[int, int], Dataset], spec: str, seed: int, size: int) -> Dataset:
    """Calls factory(seed, size) and checks its first pair. spec: the `module:factory` of data.source, for messages.

    Raises UserError if the pairs are not as data.source describes them.
    """
    pairs = factory(seed, size)
    if len(pairs) < 1:
        raise UserError(f"data.source: {spec} gives no pair, expected {size}")
    first = pairs[0]
    missing = [name for name in ("image_0", "image_1", "caption", "label_0", "label_1") if name not in first]
    if missing:
        raise UserError(f"data.source: the pairs of {spec} lack {', '.join(missing)}; found {', '.join(first)}")
    shapes = [tuple(first[name].shape) for name in ("image_0", "image_1")]
    if shapes[0] != shapes[1] or len(shapes[0]) != 3 or shapes[0][0] != 3:
        raise UserError(
            f"data.source: the images of {spec} have shapes {shapes[0]} and {shapes[1]}, expected (3, H, W)"
        )
    if abs(first["label_0"] + first["label_1"] - 1) > 1e-6:
        raise UserError(
            f"data.source: the labels of {spec} are {first['label_0']} and {first['label_1']}, expected sum 1"
        )
    return pairs


def rank_batches(count: int, batch: int, steps: int, seed: int, ranks: Ranks) -> Iterator[list[int]]:
    """Yields `steps` lists of `batch` indices for this rank, dealt from one shuffle of all `count` after the other."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch * ranks.size:
            order = torch.cat([order, torch.randperm(count, generator=rng)])
        dealt, order = order[: batch * ranks.size], order[batch * ranks.size :]
        yield dealt[ranks.rank * batch : (ranks.rank + 1) * batch].tolist()


def open_pairs(spec: str, key: str, labelled: bool, max_broken: float, limit: str = "data.max_broken") -> PairSource:
    """Opens a source as `open_source` does. Raises UserError also where it holds no pair or too many broken ones.

    limit: the key of max_broken.
    """
    source = open_source(spec, key, labelled)
    total = len(source) + len(source.broken)
    refuse_too_many(source.broken, total, key, max_broken, limit)
    if not len(source):
        why = f" but {source.left_out} rows without a label or with equal images" if source.left_out else ""
        raise UserError(f"{key}: {spec} holds no pair{why}")
    return source


def _check_factory(config: JudgeTrainingConfig, ranks: Ranks) -> None:
    data = config.data
    if data.heldout < ranks.size:
        raise UserError(f"data.heldout: found {data.heldout}, expected at least {ranks.size} (the processes)")
    resolve(data.source, "data.source")
    if data.heldout_source is not None:
        resolve(data.heldout_source, "data.heldout_source")
    check_made(data)


def check_made(data: PairsConfig) -> None:
    """Raises UserError where data.source is a factory and keys do not go with it: data.train must say how many pairs
    it makes, and data.only is for rows of files."""
    if data.only is not None:
        raise UserError(f"data.only: found {data.only}, expected null for pairs that code makes ({data.source})")
    if data.train is None:
        raise UserError(f"data.train: found null, expected the number of pairs that {data.source} shall make")


def cache_entries(
    data: PairsConfig,
    run_dir: str,
    diffusion: LatentDiffusion,
    judge: StepAwarePreferenceModel | None = None,
    texts: bool = True,
) -> Entries | None:
    """Opens the cache that data.cache names; None where it is null.

    judge: one whose scores are kept; texts: whether the captions' embeddings are.
    """
    if data.cache is None:
        return None
    folder = Path(run_dir).parent / "pair-cache" if data.cache == "auto" else Path(data.cache)
    return Entries.of(PairCache(folder), diffusion, judge, texts)
