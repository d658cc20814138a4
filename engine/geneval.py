"""`strop geneval layout|read ...`: images laid out for GenEval's official script, and its results read back.

The script itself, its detector and its prompts are its authors' and run elsewhere: nothing is detected here.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, exit_on_user_error, warn
from .evaluation.geneval import find_images, read_metadata, write_samples
from .evaluation.geneval_results import FORMAT, Results, read_results
from .evaluation.geneval_text import TITLE, as_markdown, as_text, result_of


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Prepares images for GenEval's official script, and says what its results show."""
    parser = argparse.ArgumentParser(prog="strop geneval", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="layout|read")
    _add_layout(commands)
    _add_read(commands)
    args = parser.parse_args(argv)
    {"layout": layout, "read": read}[args.command](args)


def _add_layout(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("layout", help="images in the official folders", description=layout.__doc__)
    add = parser.add_argument
    add("--metadata", required=True, type=Path, help="GenEval's evaluation_metadata.jsonl")
    add("--images", required=True, type=Path, help="a folder: 00012_3.png or 00012/0003.png is image 3 of prompt 12")
    add("--out", required=True, type=Path, help="a new folder")


def _add_read(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("read", help="what the results show", description=read.__doc__)
    add = parser.add_argument
    add("files", metavar="RESULTS.jsonl", nargs="+", type=Path, help="of the base model, then of tuned ones")
    add("--metadata", type=Path, help="the prompts that there should be (default: as many as GenEval has of each task)")
    add("--partial", action="store_true", help="go on where prompts or images are missing or double")
    add("--published", action="store_true", help="published rows below one's own")
    add("--out", type=Path, help="JSON with all numbers")
    add("--markdown", type=Path, help="the printed tables as a Markdown file")


def layout(args: argparse.Namespace) -> None:
    """Copies the images of GenEval's prompts into the folders that its official script reads."""
    if args.out.exists():
        raise UserError(f"--out: {args.out} exists already and is not overwritten; choose another place")
    prompts = read_metadata(args.metadata)
    images = find_images(args.images, prompts)
    for prompt, files in zip(prompts, images, strict=True):
        write_samples(args.out, prompt, files)
    print(f"wrote     {args.out}\nholds     {len(prompts)} prompts with {len(images[0])} images each")


def read(args: argparse.Namespace) -> None:
    """Reads results of the official script: task means, their mean, and changes against the first file."""
    for key, path, mark in (("--out", args.out, FORMAT), ("--markdown", args.markdown, TITLE)):
        if path is not None and not _is_own(path, mark):
            raise UserError(f"{key}: {path} exists already and is not of strop geneval; choose another place")
    prompts = read_metadata(args.metadata) if args.metadata else None
    files = [read_results(path, prompts) for path in args.files]
    _refuse_unless_complete(args, files)
    result = result_of(_named_apart(args.files, files), args.published)
    try:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
        if args.markdown:
            args.markdown.write_text(as_markdown(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}); choose another place") from None
    print(as_text(result))


def _refuse_unless_complete(args: argparse.Namespace, files: list[Results]) -> None:
    for path, file in zip(args.files, files, strict=True):
        if file.faults and not args.partial:
            raise UserError(
                f"{path}: found {'; '.join(file.faults)}; expected complete results. --metadata names other prompts "
                "than GenEval's, --partial goes on without the missing ones"
            )
        for fault in file.faults:
            warn(f"{path}: {fault}")


def _named_apart(paths: Sequence[Path], files: Sequence[Results]) -> list[Results]:
    """Calls results by their files, or by folder and file where two files have one name."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"found the results {', '.join(names)}, expected files of different names")
    return [Results(name, file.cells, file.faults) for name, file in zip(names, files, strict=True)]


def _is_own(path: Path, mark: str) -> bool:
    """Whether a file is free to be written: it is not there, or was written by this command."""
    try:
        return not path.exists() or mark in path.read_text(encoding="utf-8")[:80]
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    main()
