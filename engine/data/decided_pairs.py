"""Builds the pairs of methods that learn from labelled pairs: those of which one image is preferred, ties left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.utils.data import Dataset, Subset

from ..config.factory import resolve
from ..config.offline import OfflineConfig
from ..errors import UserError
from ..models.latent_diffusion import LatentDiffusion
from ..runtime.ranks import Ranks
from .pair_files import is_factory
from .pair_filter import kept_of
from .pair_scan import FLIPPED, FRAMES, PLAIN, PairScan
from .pair_sets import FilePairs, cache_entries, check_made, draw_rows, load_pairs, open_pairs


@dataclass(frozen=True, slots=True)
class DecidedPairs:
    """The pairs that a run learns from.

    ties: how many are left out because neither image is preferred; filtered: how many others data.only does not keep.
    left_out: how many rows have no label or equal images. broken: "file row: why" of pairs that could not be used.
    cached: the pairs come from the cache, not as images.
    """

    pairs: Dataset
    ties: int
    left_out: int = 0
    filtered: int = 0
    broken: list[str] = field(default_factory=list)
    cached: bool = False


def decided_pairs(config: OfflineConfig, diffusion: LatentDiffusion, ranks: Ranks) -> DecidedPairs:
    """Finds, checks and caches the pairs of section `data`. Every rank must call it.

    It writes nothing but the cache. Raises UserError if the data is not what the recipe says.
    """
    data = config.data
    if is_factory(data.source):
        return _made(config, diffusion)
    source = open_pairs(data.source, "data.source", True, data.max_broken)
    decided = [row for row, label in enumerate(source.labels) if label[0] != label[1]]
    _refuse_ties(decided, len(source), data.source)
    used = config.iterations * config.pairs_per_iteration * ranks.size
    kept = kept_of(decided, source, data)
    rows = draw_rows(kept, min(used, data.train or used), config.run.seed)
    entries, size = cache_entries(data, config.run.dir, diffusion), diffusion.image_size
    framed = config.tells_crops and diffusion.family.time_ids(*size) is not None
    more = (*((FLIPPED,) if data.flip != "none" else ()), *((FRAMES,) if framed else ()))
    kinds = (PLAIN, *more) if entries else ()
    scan = PairScan(diffusion, None, size, entries, config.optim.micro_batch, data.workers, ranks)
    result = scan.scan(source, rows, "data.source", data.max_broken, kinds)
    labels = {row: source.labels[row] for row in result.scores}
    if entries:
        scan.encode_captions([source.captions[row] for row in labels])
    pairs = FilePairs(source, labels, size, images=entries is None, entries=entries, more=more)
    broken = [*result.broken, *source.broken]
    ties, filtered = len(source) - len(decided), len(decided) - len(kept)
    return DecidedPairs(pairs, ties, source.left_out, filtered, broken, entries is not None)


def _made(config: OfflineConfig, diffusion: LatentDiffusion) -> DecidedPairs:
    """Calls the factory, and reads each pair once to find the ties."""
    spec, size = config.data.source, diffusion.image_size
    check_made(config.data)
    pairs = load_pairs(resolve(spec, "data.source"), spec, config.run.seed, config.data.train)
    shape = tuple(pairs[0]["image_0"].shape)
    if shape[1:] != size:
        raise UserError(
            f"data.source: the images of {spec} have shape {shape}, expected {(3, *size)}, the size of the model's "
            "images; resize them there, or set model.height and model.width"
        )
    decided = [i for i in range(len(pairs)) if pairs[i]["label_0"] != pairs[i]["label_1"]]
    _refuse_ties(decided, len(pairs), spec)
    return DecidedPairs(Subset(pairs, decided), len(pairs) - len(decided))


def _refuse_ties(decided: list[int], total: int, source: str) -> None:
    if not decided:
        raise UserError(
            f"data.source: all {total:,} pairs of {source} are ties, expected pairs of which one image is preferred"
        )
