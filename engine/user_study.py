"""`strop study make|analyse|pairs ...`: a study in which people compare the images of two or more systems.

`make` writes a page that opens without a server, `analyse` says what the raters' files show, `pairs` turns their
answers into preference pairs for the training of a judge. No model is loaded, and nothing is sent anywhere.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import json
import secrets
import shutil
from collections.abc import Sequence

from .errors import UserError, exit_on_user_error, short
from .runtime.output import check_free, write_all
from .study.analysis import FORMAT
from .study.analysis import analyse as analysis_of
from .study.answers import read_answers
from .study.balance import PAIR, Design
from .study.key import Key
from .study.page import make_study
from .study.pairs import write_pairs
from .study.systems import read_systems
from .study.text import TITLE, as_markdown, as_text
from .user_files import user_path

MOST_RATERS = 10_000


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Asks people which images they prefer: makes the page, and says what their answers show."""
    parser = argparse.ArgumentParser(prog="strop study", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|analyse|pairs")
    _add_make(commands)
    _add_analyse(commands)
    _add_pairs(commands)
    args = parser.parse_args(argv)
    {"make": make, "analyse": analyse, "pairs": pairs}[args.command](args)


def _add_make(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("make", help="the page for the raters and the key", description=make.__doc__)
    add = parser.add_argument
    add("systems", metavar="FOLDER", nargs="+", help="FOLDER or NAME=FOLDER of each system, or one .jsonl of images")
    add("--out", required=True, type=user_path, help="a new folder: page/ goes to the raters, key.json stays here")
    add("--prompts", type=user_path, help="prompts of the images (default: prompts.jsonl, metadata.jsonl, prompts.txt)")
    add("--raters", nargs="+", default=["10"], help="their names, or how many there are (default: 10)")
    add("--seed", type=int, help="of order, sides and names; kept in key.json (default: drawn)")
    add("--repeats", type=float, default=0.05, help="share of pairs shown twice, sides exchanged (default: 0.05)")
    add(
        "--sentinels", type=float, default=0.05, help="share of pairs of an image and its degraded twin (default: 0.05)"
    )
    add("--too-fast", type=float, default=2.0, help="seconds below which a pair's answers are marked (default: 2)")


def _add_analyse(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("analyse", help="what the answers show", description=analyse.__doc__)
    _add_answers(parser)
    parser.add_argument("--out", type=user_path, help="JSON with all numbers (default: analysis.json beside the key)")
    parser.add_argument("--markdown", type=user_path, help="the printed tables as a Markdown file")


def _add_pairs(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pairs", help="preference pairs for a judge", description=pairs.__doc__)
    _add_answers(parser)
    parser.add_argument("--out", required=True, type=user_path, help="a new .jsonl file")
    parser.add_argument("--images", type=user_path, help="the blinded images (default: page/images beside the key)")
    parser.add_argument("--question", default="general", help="general (default), appeal or alignment")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="KEY", type=user_path, help="key.json of the study")
    parser.add_argument("files", metavar="FILE", nargs="+", type=user_path, help="the files that raters have saved")


def make(args: argparse.Namespace) -> None:
    """Writes the page for the raters, with blinded images, and the key that says which system drew which image."""
    for name in ("repeats", "sentinels"):
        if not 0 <= getattr(args, name) <= 0.5:
            raise UserError(f"--{name}: found {getattr(args, name)}, expected a share of the pairs from 0 to 0.5")
    if not 0 <= args.too_fast < 3600:
        raise UserError(f"--too-fast: found {args.too_fast}, expected seconds from 0")
    check_free("--out", args.out)
    raters = _raters(args.raters)
    systems = read_systems(args.systems, args.prompts)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    design = Design(len(systems.names), len(systems.prompts), raters, seed, args.repeats, args.sentinels)
    try:
        key = make_study(systems, design, args.too_fast, args.out)
    except OSError as error:
        raise UserError(f"--out: {args.out} cannot be written ({error.strerror}); choose another place") from None
    except UserError:
        shutil.rmtree(args.out)  # it was empty or not there
        raise
    shown = list(next(iter(key.items.values())).values())
    pairs = sum(item.kind == PAIR for item in shown)
    rows = {
        "systems": ", ".join(systems.names),
        "a rater sees": f"{len(shown)} pairs: {pairs} of {len(systems.prompts)} prompts, "
        f"{sum(item.kind == 'repeat' for item in shown)} repeats, "
        f"{sum(item.kind == 'sentinel' for item in shown)} sentinels",
        "raters": f"{len(raters)}, each with an order of their own",
        "seed": seed,
        "give away": f"{args.out / 'page'}, whole: index.html opens without a server",
        "keep": f"{args.out / 'key.json'}, which names the systems",
    }
    print("\n".join(f"{name:<14}{value}" for name, value in rows.items()))


def analyse(args: argparse.Namespace) -> None:
    """Counts the answers, with intervals, tests, agreement between raters, and how careful each of them was."""
    out = args.out or args.key.parent / "analysis.json"
    check_free("--out", out, FORMAT)
    check_free("--markdown", args.markdown, TITLE)
    key = Key.read(args.key)
    result = analysis_of(key, read_answers(key, args.files))
    write_all({out: json.dumps(result, indent=1), args.markdown: as_markdown(result)})
    print(f"{as_text(result)}\n\nall numbers: {out}")


def pairs(args: argparse.Namespace) -> None:
    """Turns the answers to one question into preference pairs from which a judge can be trained."""
    if args.out.suffix != ".jsonl" or args.out.exists():
        raise UserError(f"--out: found {args.out}, expected the name of a new .jsonl file; nothing is overwritten")
    key = Key.read(args.key)
    if args.question not in key.questions:
        raise UserError(f"--question: found {args.question!r}, expected one of {', '.join(key.questions)}")
    images = args.images or args.key.parent / "page" / "images"
    count, ties = write_pairs(key, read_answers(key, args.files), args.question, images, args.out)
    print(f"wrote     {args.out}\nholds     {count} pairs, {ties} of them ties: {key.questions[args.question]}")
    print(f"use it    strop train-judge RECIPE data.source={args.out}")


def _raters(words: list[str]) -> list[str]:
    """Returns the names of the raters; a number alone makes as many."""
    if len(words) == 1 and words[0].isdecimal():
        count = int(words[0][:9])
        if count > MOST_RATERS:
            raise UserError(f"--raters: found {short(words[0])}, expected at most {MOST_RATERS:,}")
        words = [f"rater {number}" for number in range(1, count + 1)]
    names = [word.strip() for word in words]
    if not names or len(set(names)) < len(names) or not all(0 < len(name) <= 40 for name in names):
        raise UserError(f"--raters: found {words}, expected different names of 1 to 40 characters, or a number from 1")
    return names


if __name__ == "__main__":
    main()
