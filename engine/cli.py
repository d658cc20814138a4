"""`strop COMMAND ...`: the programs of this package under one name. Each is a module with its own `main(argv)`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .errors import UserError, exit_on_user_error

COMMANDS = {  # name: (module, what it does)
    "train": (".train", "post-train a model by a recipe"),
    "train-judge": (".train_judge", "train a judge from preference pairs"),
    "filter-pairs": (".filter_pairs", "keep the pairs on whose label scorers agree"),
    "plan": (".plan.__main__", "print what a recipe costs, before anything runs"),
    "evaluate": (".evaluate_lora", "compare LoRAs with their base: scores, intervals, gallery"),
    "evaluate-judge": (".evaluate_judge", "how often what a judge picks ends up better"),
    "export": (".export", "write a LoRA for diffusers, ComfyUI or A1111, or merge it"),
    "report": (".report.__main__", "remake the report of a run"),
    "study": (".user_study", "people compare images: the page, the analysis"),
    "geneval": (".geneval", "images for GenEval's script; its results, read back"),
}


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Runs one of strop's programs; `strop COMMAND --help` says what it takes."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="strop",
        usage="strop COMMAND ...",
        description=main.__doc__,
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("strop"))
    parser.add_argument("command", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[:1] or ["--help"])
    if args.command not in COMMANDS:
        near = difflib.get_close_matches(args.command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"strop: found the command {args.command!r}, expected one of {', '.join(COMMANDS)}{hint}")
    module, _ = COMMANDS[args.command]
    sys.argv[0] = f"strop {args.command}"
    import_module(module, __package__).main(list(argv[1:]))
