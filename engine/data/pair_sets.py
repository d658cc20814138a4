"""From the recipe's `data` section to the pairs that are trained on and those that are held out.

Three forms of data: a folder of Pick-a-Pic parquet files, a .jsonl file, and code (module:factory), whose pairs are
taken as they come and never cached. Reading is data/pair_files.py, the pass before training pair_survey.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..config.factory import resolve
from ..config.judge_training import JudgeTrainingConfig
from ..errors import UserError
from ..judge.denoiser import Denoiser
from ..judge.model import StepAwarePreferenceModel
from ..models.latent_diffusion import LatentDiffusion
from ..runtime.ranks import Ranks
from .pair_cache import PairCache
from .pair_files import PairSource, fitted, is_factory, open_source
from .pair_survey import Entries, Surveyor, pickscore_labels, refuse_too_many


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows of a source, and the configuration key where it stands."""

    source: PairSource
    rows: list[int]
    key: str


@dataclass(frozen=True, slots=True)
class PairSets:
    """Pairs to train on and held-out pairs.

    broken: "file row: why" of those that could not be used; left_out: rows that teach nothing, or whose caption stands
    in data.heldout_source. kept: the training pairs come from the cache, not as images.
    """

    train: Dataset
    heldout: Dataset
    broken: list[str] = field(default_factory=list)
    left_out: int = 0
    kept: bool = False


class FilePairs(Dataset):
    """Pairs of files: {caption, label_0, label_1, num_examples}, and what of the images was asked for.

    images: image_0, image_1 (3, H, W) in [-1, 1]. entries: mean, std (2, C, h, w) of the VAE's posteriors, text (L, D)
    and pooled (P) where the UNet takes it, in float16, from the cache.
    """

    def __init__(
        self,
        source: PairSource,
        labels: dict[int, Sequence[float]],
        size: tuple[int, int],
        images: bool,
        entries: Entries | None = None,
    ):
        """labels: of each row of the source that is used; size: (height, width) of the images."""
        self.source, self.rows, self.labels = source, list(labels), list(labels.values())
        self.size, self.images, self.entries = size, images, entries

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row, labels = self.rows[i], self.labels[i]
        pair = {"caption": self.source.captions[row], "num_examples": self.source.num_examples[row]}
        pair |= {"label_0": float(labels[0]), "label_1": float(labels[1])}
        if self.images:
            images = (fitted(image, *self.size) for image in self.source.images(row))
            pair |= zip(("image_0", "image_1"), images, strict=True)
        if self.entries:
            for path in (self.entries.latents(self.source, row, self.size), self.entries.text(pair["caption"])):
                entry = self.entries.cache.read(path)
                if entry is None:
                    raise UserError(f"data.cache: {path} was whole when the run began and is not now; start again")
                pair |= entry
        return pair


def choose(config: JudgeTrainingConfig, ranks: Ranks) -> tuple[Chosen, Chosen] | None:
    """Which rows of which files are trained on and which are held out; None for data made by code.

    No caption is on both sides. Raises UserError where the data is not what the recipe says it is.
    """
    data = config.data
    if is_factory(data.source):
        _check_factory(config, ranks)
        return None
    labelled = data.labels == "given"
    train = _opened(data.source, "data.source", labelled, data.max_broken)
    if data.heldout_source is None:
        rows, heldout_rows = split_by_caption(train.captions, data.heldout, config.run.seed)
        heldout = Chosen(train, heldout_rows, "data.source")
    else:
        source = _opened(data.heldout_source, "data.heldout_source", labelled, data.max_broken)
        heldout = Chosen(source, list(range(min(len(source), data.heldout))), "data.heldout_source")
        theirs = {source.captions[row] for row in heldout.rows}
        rows = [row for row, caption in enumerate(train.captions) if caption not in theirs]
        train.left_out += len(train) - len(rows)
    if not rows or len(heldout.rows) < ranks.size:
        raise UserError(
            f"{heldout.key}: found {len(rows)} pairs to train on and {len(heldout.rows)} held-out ones with other "
            f"captions, expected at least 1 and {ranks.size} (the processes); data.heldout says how many are held out"
        )
    seen = config.optim.steps * config.optim.accumulate * config.optim.batch * ranks.size
    most = min(len(rows), seen, data.train or seen)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.run.seed))
    return Chosen(train, [rows[at] for at in sorted(order[:most].tolist())], "data.source"), heldout


def split_by_caption(captions: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and `count` held-out rows, all rows of a caption on one side; captions are drawn by seed."""
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows_of.setdefault(caption, []).append(row)
    groups = list(rows_of.values())
    heldout: list[int] = []
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    while order and len(heldout) < count:
        heldout += groups[order.pop(0)]
    return sorted(row for at in order for row in groups[at]), sorted(heldout[:count])


def check_labeller(config: JudgeTrainingConfig, judge: StepAwarePreferenceModel) -> None:
    """Raises UserError where judge.path is to make PickScore's labels, but has been trained for timesteps."""
    modulated = (value for name, value in judge.clip.named_parameters() if "adaLN_modulation.1.weight" in name)
    if config.data.labels == "pickscore" and any(value.any() for value in modulated):
        raise UserError(
            f"data.labels: pickscore needs a plain PickScore as judge.path, and {config.judge.path} is a judge already "
            "trained; begin from PickScore or use the given labels"
        )


def make_sets(
    config: JudgeTrainingConfig,
    chosen: tuple[Chosen, Chosen] | None,
    denoiser: Denoiser,
    judge: StepAwarePreferenceModel,
    ranks: Ranks,
) -> PairSets:
    """The pass over the pairs, and what comes out of it. Every rank calls it."""
    data, seed = config.data, config.run.seed
    if chosen is None:
        spec = data.heldout_source or data.source
        train = load_pairs(resolve(data.source, "data.source"), data.source, seed, data.train)
        return PairSets(train, load_pairs(resolve(spec, "data.heldout_source"), spec, seed + 1, data.heldout))
    diffusion = denoiser.diffusion
    size = tuple(side * diffusion.factor for side in diffusion.latent_shape[1:])  # height, width
    scored = data.labels == "pickscore"
    entries = _entries(config, diffusion, judge if scored else None)
    surveyor = Surveyor(denoiser, judge, size, entries, scored, config.optim.batch, data.workers, ranks)
    sets, broken = [], []
    for part, encode in zip(chosen, (entries is not None, False), strict=True):
        found = surveyor.survey(part.source, part.rows, part.key, data.max_broken, encode)
        broken += found.broken
        labels = {row: part.source.labels[row] for row in found.scores}
        if scored:
            rows, scores = list(found.scores), torch.tensor(list(found.scores.values())).T  # (2, N)
            labels = dict(zip(rows, pickscore_labels(scores, data.tie).T.tolist(), strict=True))
        clean = config.optim.clean_share > 0
        sets.append(FilePairs(part.source, labels, size, not encode or clean, entries if encode else None))
    train, heldout = chosen
    if entries:
        surveyor.encode_captions([train.source.captions[row] for row in sets[0].rows])
    sources = [train.source] if heldout.source is train.source else [train.source, heldout.source]
    broken += [line for source in sources for line in source.broken]
    return PairSets(*sets, broken, sum(source.left_out for source in sources), entries is not None)


def load_pairs(factory: Callable[[int, int], Dataset], spec: str, seed: int, size: int) -> Dataset:
    """factory(seed, size), its first pair checked. spec: the entry point data.source, where factory comes from.

    Raises UserError where the pairs are not as data.source describes them.
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


def shares(count: int, batch: int, steps: int, seed: int, ranks: Ranks) -> Iterator[list[int]]:
    """`steps` lists of `batch` indices of this rank: one shuffle of all `count` after the other, dealt to the ranks."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch * ranks.size:
            order = torch.cat([order, torch.randperm(count, generator=rng)])
        dealt, order = order[: batch * ranks.size], order[batch * ranks.size :]
        yield dealt[ranks.rank * batch : (ranks.rank + 1) * batch].tolist()


def _opened(spec: str, key: str, labelled: bool, max_broken: float) -> PairSource:
    source = open_source(spec, key, labelled)
    total = len(source) + len(source.broken)
    refuse_too_many(source.broken, total, key, max_broken)
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
    if data.train is None:
        raise UserError(f"data.train: say how many pairs {data.source} is to make")
    if data.labels == "pickscore":
        raise UserError(f"data.labels: {data.source} gives its own labels; pickscore is for pairs in files")


def _entries(
    config: JudgeTrainingConfig, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel | None
) -> Entries | None:
    if config.data.cache is None:
        return None
    beside = Path(config.run.dir).parent / "pair-cache"
    folder = beside if config.data.cache == "auto" else Path(config.data.cache).expanduser()
    return Entries.of(PairCache(folder), diffusion, judge)
