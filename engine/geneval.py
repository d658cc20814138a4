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
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .errors import UserError, exit_on_user_error, warn
from .evaluation.geneval import find_images, read_metadata, write_samples
from .evaluation.geneval_results import FORMAT, Results, read_results
from .evaluation.geneval_text import TITLE, as_markdown, as_text, result_of
from .runtime.output import check_free, write_all
from .user_files import user_path


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
    add("--metadata", required=True, type=user_path, help="GenEval's evaluation_metadata.jsonl")
    add(
        "--images",
        required=True,
        type=user_path,
        help="a folder; 00012_3.png or 00012/0003.png: image 3 of prompt 12",
    )
    add("--out", required=True, type=user_path, help="a new folder")


def _add_read(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("read", help="what the results show", description=read.__doc__)
    add = parser.add_argument
    add("files", metavar="RESULTS.jsonl", nargs="+", type=user_path, help="of the base model, then of tuned ones")
    add(
        "--metadata",
        type=user_path,
        help="the prompts that there should be (default: as many of a task as GenEval)",
    )
    add("--partial", action="store_true", help="go on where prompts or images are missing or double")
    add("--published", action="store_true", help="published rows below one's own")
    add("--out", type=user_path, help="JSON with all numbers")
    add("--markdown", type=user_path, help="the printed tables as a Markdown file")


def layout(args: argparse.Namespace) -> None:
    """Copies the images of GenEval's prompts into the folders that its official script reads."""
    check_free("--out", args.out)
    prompts = read_metadata(args.metadata)
    images = find_images(args.images, prompts)
    try:
        for prompt, files in zip(prompts, images, strict=True):
            write_samples(args.out, prompt, files)
    except UserError:
        shutil.rmtree(args.out, ignore_errors=True)  # it was new or empty
        raise
    print(f"wrote     {args.out}\nholds     {len(prompts)} prompts with {len(images[0])} images each")


def read(args: argparse.Namespace) -> None:
    """Reads results of the official script: task means, their mean, and changes against the first file."""
    check_free("--out", args.out, FORMAT)
    check_free("--markdown", args.markdown, TITLE)
    prompts = read_metadata(args.metadata) if args.metadata else None
    files = [read_results(path, prompts) for path in args.files]
    _refuse_unless_complete(args, files)
    result = result_of(_named_apart(args.files, files), args.published)
    write_all({args.out: json.dumps(result, indent=1), args.markdown: as_markdown(result)})
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
    return [replace(file, name=name) for name, file in zip(names, files, strict=True)]


if __name__ == "__main__":
    main()
