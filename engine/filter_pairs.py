"""`strop filter-pairs SOURCE OUT --scorers ...`: keeps the pairs on whose label scorers agree, for data.only.

It is the filter of the data that LPO's latent reward models are trained on (arXiv 2502.01051). No images are copied.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .data.pair_filter import DECIDED, LPO, TIES, PairFilter, Rule
from .errors import UserError, exit_on_user_error, warn
from .evaluation.arguments import DEVICES, MOST, one_of, scorers_of
from .scorers.names import NAMES as SCORERS
from .user_files import user_path

RULE = (
    "Bounds of gaps are NAME=NUMBER with commas between them, of the names that scores have in `strop evaluate`. The "
    "defaults are LPO's without its VQA score. Its 0.03 is of a cosine, which is 3 here: clip_score is 100 cosines. "
    "With other bounds the same command decides anew and scores nothing again."
)


@dataclass(frozen=True, slots=True)
class Request:
    """The checked arguments."""

    source: str
    out: Path
    scorers: tuple[str, ...]
    rule: Rule
    max_broken: float
    batch: int
    workers: int
    device: str

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """Checks the words of a command line. Raises UserError that names the argument."""
        if ":" in args.source and not user_path(args.source).exists():
            raise UserError(f"SOURCE: found {args.source}, expected parquet files or a .jsonl file, no code")
        one_of("--device", args.device, DEVICES)
        for name, least, most in (("batch", 1, MOST), ("workers", 0, 256), ("max_broken", 0, 1)):
            if not least <= getattr(args, name) <= most:
                key = name.replace("_", "-")
                raise UserError(f"--{key}: found {getattr(args, name)}, expected a number from {least} to {most:,}")
        rule = Rule(_bounds("--gap", args.gap), _bounds("--tie-gap", args.tie_gap))
        if negative := [name for name, bound in rule.tie_gap.items() if bound < 0]:
            raise UserError(f"--tie-gap: found {args.tie_gap}, expected a number from 0 for {negative[0]}")
        scorers = scorers_of(args.scorers)
        names = [spec.partition("=")[0] for spec in scorers]
        if set(names) <= set(SCORERS):  # what code calls its scores shows when it is run
            rule.check(names)
        fields = {name: getattr(args, name) for name in cls.__dataclass_fields__ if hasattr(args, name)}
        return cls(**fields | {"source": str(user_path(args.source)), "scorers": scorers, "rule": rule})


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Scores both images of labelled pairs and says which pairs' scores agree with their label, for data.only."""
    parser = argparse.ArgumentParser(prog="strop filter-pairs", description=main.__doc__, epilog=RULE)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="parquet files (a folder or folder/train-*.parquet) or .jsonl, as data.source")
    add(
        "out",
        metavar="OUT",
        type=user_path,
        help="file of a JSON line for each pair; the same command goes on",
    )
    add(
        "--scorers",
        required=True,
        help=f"of {', '.join(SCORERS)}, each also as name=weights, or module:factory: aesthetic=FILE,clip_score",
    )
    bounds = {key: ",".join(f"{name}={bound:g}" for name, bound in getattr(LPO, key).items()) for key in LPO.__slots__}
    add("--gap", default=bounds["gap"], help="the preferred image's score minus the other's is larger (%(default)s)")
    add("--tie-gap", default=bounds["tie_gap"], help="scores of a tie differ by less; 0 keeps none (%(default)s)")
    add("--max-broken", type=float, default=0.01, help="share of broken pairs above which it ends (%(default)s)")
    add("--batch", type=int, default=16, help="pairs scored at a time (%(default)s)")
    add("--workers", type=int, default=0, help="processes that read images beside this one (%(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    run(Request.of(parser.parse_args(argv)))


def run(request: Request) -> None:
    """Scores the pairs that have no scores yet, and writes and says which ones are kept."""
    from .data.pair_scan import ProgressLine, refuse_too_many  # torch takes seconds: the words are right by now
    from .data.pair_sets import open_pairs
    from .models.base_model import quiet_libraries
    from .runtime.ranks import start
    from .scorers.find import load_scorer
    from .scorers.pair_gaps import KEY, PairScorer

    quiet_libraries()
    try:
        device = start(request.device).device
    except UserError as error:
        raise UserError(str(error).replace("run.device", "--device")) from None
    limit = "--max-broken"
    source = open_pairs(request.source, "SOURCE", True, request.max_broken, limit)
    chosen = PairFilter(request.out, request.source, source, request.scorers, request.rule)
    rows = [row for row in range(len(source)) if row not in chosen.done]
    if rows:
        scorers = {spec: load_scorer(spec, KEY, device, 2 * request.batch) for spec in request.scorers}
        announce(request, len(source), len(rows), str(device))
        progress = ProgressLine("pairs", len(rows), True)
        for entries in PairScorer(source, scorers, device, request.batch, request.workers).entries(rows):
            chosen.add(entries)
            refuse_too_many(chosen.broken, len(source), "SOURCE", request.max_broken, limit)
            progress.step(len(entries))
    chosen.finish()
    close(chosen)


def announce(request: Request, pairs: int, left: int, device: str) -> None:
    """Says what is about to be done."""
    rule = request.rule
    bounds = (rule.text(kind, name) for kind, names in ((DECIDED, rule.gap), (TIES, rule.tie_gap)) for name in names)
    done = f", {pairs - left:,} of which have scores in {request.out}" if left < pairs else ""
    print(f"source    {request.source}: {pairs:,} pairs{done}")
    print(f"scorers   {', '.join(request.scorers)}, on {device}")
    print(f"keeps     {', '.join(bounds)}", flush=True)


def close(chosen: PairFilter) -> None:
    """Says what was found."""
    seen, kept, broken = chosen.seen, chosen.kept, chosen.broken
    such_as = f", such as {broken[0]}" if broken else ""
    parts = [(kind, kept[kind], seen[kind]) for kind in (DECIDED, TIES)] + [("all", kept.total(), seen.total())]
    shares = (f"{name} {part:,} of {whole:,} ({part / max(whole, 1):.1%})" for name, part, whole in parts)
    print(f"seen      {seen.total():,} pairs, and {len(broken):,} broken ones{such_as}")
    print(f"kept      {', '.join(shares)}")
    for condition, count in chosen.unmet.most_common():
        print(f"          {count:,} do not have {condition}")
    print(f"wrote     {chosen.path}, for data.only")
    if not kept.total():
        warn(f"{chosen.path} keeps no pair, and data.only refuses it; other bounds of --gap and --tie-gap keep more")


def _bounds(key: str, words: str) -> dict[str, float]:
    """Reads NAME=NUMBER,... Raises UserError that names the option."""
    parts = [word.rpartition("=")[::2] for word in words.split(",")]
    try:
        bounds = {name.strip(): float(number) for name, number in parts}
    except ValueError:
        bounds = {}
    if len(bounds) != len(parts) or "" in bounds or not all(map(math.isfinite, bounds.values())):
        raise UserError(f"{key}: found {words!r}, expected NAME=NUMBER with commas, each name once, as clip_score=0")
    return bounds


if __name__ == "__main__":
    main()
