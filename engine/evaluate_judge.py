"""`strop evaluate-judge RECIPE [key=value ...]`: how often what a judge picks ends up better. Nothing is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .config.find import load
from .config.methods.spo import SPOConfig
from .errors import UserError, exit_on_user_error
from .user_files import user_path


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Lets the judge of a recipe pick winner and loser among siblings of the base model, finishes both without noise,
    and asks evaluate.scorers how often the winner is the better image: a coin reaches 50%."""
    parser = argparse.ArgumentParser(prog="strop evaluate-judge", description=main.__doc__)
    add = parser.add_argument
    add("recipe", help="recipe of a training by SPO, such as tinyworld")
    add("overrides", nargs="*", metavar="key=value", help="such as judge.path=runs/judge/judge judge.kind=latent")
    add("--prompts", type=int, default=64, help="held-out prompts, a pool each at every step (default: %(default)s)")
    add("--steps", type=int, default=5, help="steps that are judged, evenly spread (default: %(default)s)")
    add("--out", type=user_path, help="file for the figures, as JSON")
    args = parser.parse_args(argv)
    for option, value in (("--prompts", args.prompts), ("--steps", args.steps)):
        if value < 1:
            raise UserError(f"{option}: found {value}, expected 1 or more")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise UserError(f"--out: {args.out} cannot be written; give a file in a folder that there is")
    config = load(args.recipe, [*args.overrides, f"evaluate.prompts={args.prompts}"])
    if not isinstance(config, SPOConfig):
        raise UserError(f"{args.recipe}: found method {config.method}, expected one with branches, spo or gradspo")
    if not config.evaluate.scorers:
        raise UserError("evaluate.scorers: found none, expected those that say which finished image is better")
    from . import judge_evaluation  # torch and diffusers take seconds: what is wrong with a word has been said by now

    judge_evaluation.run(config, args.steps, args.out)
