"""What a study compares: for each system an image of each prompt, read from folders or from one .jsonl file.

It reads names and prompts. The images themselves are read when the page is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..data.json_lines import read_objects
from ..data.prompts import read_prompts
from ..errors import UserError
from ..evaluation.geneval import IMAGE_SUFFIXES
from ..user_files import is_text, user_path

PROMPT_FILES = ("prompts.jsonl", "metadata.jsonl", "prompts.txt")  # looked for in the first folder, in this order
FILE_KEYS = ("file", "name", "file_name", "image")
PROMPT_KEYS = ("prompt", "caption", "text")


@dataclass(frozen=True, slots=True)
class Systems:
    """S systems and their images of P prompts.

    names: S texts. stems: P names that the images of one prompt share. prompts: P texts. files[s][p]: the image that
    system s drew of prompt p.
    """

    names: list[str]
    stems: list[str]
    prompts: list[str]
    files: list[list[Path]]


def read_systems(sources: list[str], prompts_file: Path | None) -> Systems:
    """Reads two or more folders of images, or one .jsonl file that lists the images of all systems.

    A folder is FOLDER or NAME=FOLDER; without NAME the system is called as its folder. Raises UserError that names the
    folder, file or line at fault.
    """
    if len(sources) == 1 and sources[0].endswith(".jsonl"):
        return _from_list(user_path(sources[0]))
    folders = dict(_named(source) for source in sources)
    if len(folders) < 2 or len(folders) < len(sources):
        raise UserError(
            f"study make: found the systems {', '.join(folders) or 'none'}, expected two or more folders of different "
            "names, or one .jsonl file; NAME=FOLDER gives a folder another name"
        )
    images = {name: _images(folder) for name, folder in folders.items()}
    (first, known), *others = images.items()
    for name, found in others:
        if missing := known.keys() ^ found.keys():
            stem = sorted(missing)[0]
            lacking, having = (name, first) if stem in known else (first, name)
            raise UserError(
                f"{folders[lacking]}: found no image {stem}, which {folders[having]} has (one of {len(missing)} such "
                "differences); expected images of the same names in every folder, one a prompt"
            )
    stems = sorted(known, key=_natural)
    prompts = _prompts(prompts_file or _prompt_file(folders[first]), stems)
    return Systems(list(images), stems, prompts, [[found[stem] for stem in stems] for found in images.values()])


def _named(source: str) -> tuple[str, Path]:
    name, equals, folder = source.partition("=")
    path = user_path(folder if equals else source)
    return (name if equals else path.resolve().name), path


def _natural(stem: str) -> list:
    """The order of a person: 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", stem)]


def _images(folder: Path) -> dict[str, Path]:
    """Returns the images of a folder by their stems."""
    if not folder.is_dir():
        raise UserError(f"study make: found no folder {folder}; expected a folder of images for each system")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: found no image, expected one a prompt ({', '.join(IMAGE_SUFFIXES)})")
    images = {path.stem: path for path in files}
    if len(images) < len(files):
        raise UserError(f"{folder}: found several images of one name, expected one a prompt; remove the others")
    return images


def _prompt_file(folder: Path) -> Path:
    files = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"{folder}: found none of {', '.join(PROMPT_FILES)}, expected one that says which prompt each image is of; "
            "--prompts names a file elsewhere"
        )
    return files[0]


def _prompts(path: Path, stems: list[str]) -> list[str]:
    """Returns the prompt of each stem: by name where a .jsonl names files, else line by line in the order of names."""
    by_stem = _prompts_by_stem(path) if path.suffix.lower() == ".jsonl" else {}
    if by_stem:
        missing = [stem for stem in stems if stem not in by_stem]
        if missing:
            raise UserError(f"--prompts: {path} has no line for the image {missing[0]} ({len(missing)} such images)")
        return [by_stem[stem] for stem in stems]
    prompts = read_prompts(str(path), "--prompts")
    if len(prompts) != len(stems):
        raise UserError(
            f"--prompts: {path} holds {len(prompts)} prompts and each folder {len(stems)} images; expected as many, in "
            'the order of the names of the images, or a .jsonl of {"file": name, "prompt": text}'
        )
    return prompts


def _prompts_by_stem(path: Path) -> dict[str, str]:
    """Returns the prompts of a .jsonl whose lines name their files, or nothing where no line does."""
    rows = read_objects(path, f"--prompts: {path}", "JSON lines")
    named = [(number, row, _first(row, FILE_KEYS)) for number, row in rows]
    if all(file is None for _, _, file in named):
        return {}
    prompts = {}
    for number, row, file in named:
        prompt = _first(row, PROMPT_KEYS)
        if file is None or prompt is None:
            raise UserError(f'--prompts: {path}: line {number}: expected {{"file": name, "prompt": text}}')
        name = Path(file).name
        stem = Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name
        if prompts.setdefault(stem, prompt) != prompt:
            raise UserError(f"--prompts: {path}: line {number}: {stem} has two prompts, expected one")
    return prompts


def _from_list(path: Path) -> Systems:
    """Reads lines of {"prompt": text, "images": {system: file}}; files are relative to the .jsonl."""
    form = '{"prompt": text, "images": {system: file, ...}} with the same two or more systems in every line'
    rows = read_objects(path, f"study make: {path}", form)
    names = list(rows[0][1].get("images") or ())
    if len(names) < 2:
        raise UserError(f"study make: {path}: line {rows[0][0]}: found the systems {names}, expected {form}")
    prompts, files = [], []
    for number, row in rows:
        prompt, images = _first(row, PROMPT_KEYS), row.get("images")
        whole = isinstance(images, dict) and images.keys() == set(names)
        if prompt is None or not whole or not all(isinstance(file, str) for file in images.values()):
            raise UserError(f"study make: {path}: line {number}: expected {form}")
        prompts.append(prompt)
        files.append([path.parent / images[name] for name in names])
    stems = [str(number) for number, _ in rows]
    return Systems(names, stems, prompts, [list(column) for column in zip(*files, strict=True)])


def _first(row: dict, keys: tuple[str, ...]) -> str | None:
    return next((row[key] for key in keys if is_text(row.get(key))), None)
