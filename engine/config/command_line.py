"""Reads the command line of the programs that run a recipe: RECIPE [key=value ...]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .settings import C, load


def recipe_of(argv: Sequence[str], prog: str, description: str | None, example: str, cls: type[C]) -> C:
    """Loads the recipe that a command line names, with its overrides. Raises UserError as `load` does."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("recipe", help=f"YAML file, such as {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.dir=runs/mine optim.lr=1e-4")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    args = parser.parse_args(argv)
    return load(args.recipe, args.overrides, cls)
