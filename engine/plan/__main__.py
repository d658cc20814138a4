"""Prints what a recipe costs before it runs: `python -m strop.engine.plan RECIPE [key=value ...] --gpu a100`."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config.find import load
from ..errors import UserError, exit_on_user_error
from .gpus import ASSUMED_SHARE, GPUS, gpu_at_share


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Opens a context in which Python looks for no garbage, nor when it exits: a fifth of a plan's time, for little."""
    atexit.register(gc.freeze)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@exit_on_user_error
@garbage_kept()
def main(argv: Sequence[str]) -> None:
    """Prints what a recipe costs, before anything runs."""
    parser = argparse.ArgumentParser(prog="python -m strop.engine.plan", description=main.__doc__)
    parser.add_argument("recipe", help="YAML file, such as those of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.k=2 model.unet_rows=8")
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them")
    parser.add_argument("--prompts", type=int, help="of the whole run, or pairs, in place of run.iterations")
    parser.add_argument("--share", type=float, help=f"of the GPU's peak; {ASSUMED_SHARE} where none was measured")
    parser.add_argument("--family", help="of a model that is not on this machine, such as sd15")
    parser.add_argument("--json", metavar="FILE", help="write the plan there as JSON, too")
    args = parser.parse_intermixed_args(argv)
    config = load(args.recipe, args.overrides)
    for name, value in (("--gpus", args.gpus), ("--prompts", args.prompts)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    if args.share is not None and not 0 < args.share <= 1:
        raise UserError(f"--share: found {args.share:g}, expected a share of the peak above 0 and at most 1")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json: found {args.json}, expected a file in a folder that exists")
    recipe = Path(args.recipe).stem
    gpu = gpu_at_share(args.gpu, args.share, recipe)
    # torch and diffusers take seconds to import: a wrong command line has been refused by now
    from ..models.base_model import quiet_libraries
    from ..models.families.find import family_named
    from .estimate import Plan
    from .text import render

    quiet_libraries()
    family = family_named(args.family) if args.family else None
    plan = Plan(config, recipe, gpu, args.gpus, args.prompts, family)
    if args.json:
        Path(args.json).write_text(json.dumps(plan.as_json(), indent=2) + "\n", encoding="utf-8")
    print(render(plan))


if __name__ == "__main__":
    main()
