"""Reads the command line of the programs that run a recipe: RECIPE [key=value ...]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .find import load
from .settings import C


def recipe_of(argv: Sequence[str], prog: str, description: str | None, example: str, cls: type[C]) -> C:
    """Loads the recipe that a command line names, with its overrides. Raises UserError as `load` does."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("recipe", help=f"YAML file, such as {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.dir=runs/mine optim.lr=1e-4")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # set by the deepspeed launcher
    args = parser.parse_args(argv)
    config = load(args.recipe, args.overrides, cls)
    model = Path(config.model.path)
    if model.parts[:2] == ("bench", "tinyworld") and not model.exists():
        raise UserError(
            f"model.path: found no {model} here; tinyworld's models and prompts are in strop's repository and not in "
            "the package: type this in the folder of a checkout"
        )
    return config
