"""GenEval's prompts and the folder layout that its official script reads; detectors and their weights are not here.

Source: Ghosh et al., 2023 (arXiv 2310.11513). The prompts are a file of its authors, evaluation_metadata.jsonl, a JSON
object a line. The images of prompt n lie beside its line: NNNNN/metadata.jsonl, NNNNN/samples/00000.png, 00001.png ...
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.image_files import BrokenImage, read_image
from ..data.json_lines import read_objects
from ..errors import UserError, one_line, short
from ..user_files import is_text

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
OFFICIAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt `number` (from 0) of a metadata file: its task, its text, and its whole line, which says what is asked."""

    number: int
    tag: str
    text: str
    row: Mapping

    def sample(self, out: Path, number: int) -> Path:
        """Returns where image `number` (from 0) of this prompt lies in the layout."""
        return self.folder(out) / "samples" / f"{number:05}.png"

    def folder(self, out: Path) -> Path:
        """Returns the folder of this prompt in the layout."""
        return out / f"{self.number:05}"

    def write(self, out: Path) -> None:
        """Writes this prompt's line where the layout has it, and makes the folder of its images."""
        (self.folder(out) / "samples").mkdir(parents=True, exist_ok=True)
        (self.folder(out) / "metadata.jsonl").write_text(json.dumps(self.row), encoding="utf-8")


def read_metadata(path: Path) -> list[Prompt]:
    """Reads the prompts of a metadata file, in its order.

    Raises UserError that names file and line: not JSON, a task that GenEval does not have, no prompt, a prompt that was
    there before, or something asked for in another form than GenEval's.
    """
    prompts: dict[str, Prompt] = {}
    for line, row in read_objects(path, str(path), "the prompts of GenEval (evaluation_metadata.jsonl)"):
        where = f"{path}: line {line}"
        tag, text = row.get("tag"), row.get("prompt")
        if tag not in TASKS:
            raise UserError(f"{where}: found the tag {short(tag)}, expected one of {', '.join(TASKS)}")
        if not is_text(text) or not text.strip():
            raise UserError(f"{where}: found the prompt {short(text)}, expected a sentence")
        if text in prompts:
            raise UserError(f"{where}: found the prompt {short(text)} a second time, expected each once")
        if not _asks(row):
            raise UserError(
                f"{where}: found include {short(row.get('include'))} and exclude {short(row.get('exclude', []))}, "
                "expected lists of objects with class, count and, where they are asked for, color or position"
            )
        prompts[text] = Prompt(len(prompts), tag, text, row)
    return list(prompts.values())


def write_samples(out: Path, prompt: Prompt, images: Sequence[Path]) -> None:
    """Writes the images of one prompt, and its line, where the official script looks for them.

    PNG files are copied byte for byte; files of other kinds become RGB and PNG. Raises UserError for
    what cannot be read or written.
    """
    try:
        prompt.write(out)
        for number, image in enumerate(images):
            _save(image, prompt.sample(out, number))
    except BrokenImage as error:
        raise UserError(f"--images: {error}") from None
    except OSError as error:
        raise UserError(f"{prompt.folder(out)} cannot be written ({one_line(error)}); choose another place") from None


def find_images(folder: Path, prompts: Sequence[Prompt]) -> list[list[Path]]:
    """Finds the images of every prompt in a folder: the last two numbers of a path are those of prompt and image.

    00012/0003.png, 12_3.png and the layout itself are all image 3 of prompt 12; both count from 0. Raises UserError for
    a name without two numbers, two files of one image, and unless every prompt has images 0 to N - 1, one N for all.
    """
    if not folder.is_dir():
        raise UserError(f"--images: found no folder {folder}, expected the images of {len(prompts)} prompts")
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        numbers = re.findall(r"\d+", str(path.relative_to(folder).with_suffix("")))
        if len(numbers) < 2:
            raise UserError(f"{path}: found no two numbers in the name, expected prompt and image, such as 00012_3.png")
        place = int(numbers[-2]), int(numbers[-1])
        if place in found:
            raise UserError(f"{path}: found image {place[1]} of prompt {place[0]}, which is {found[place]} too")
        found[place] = path
    each = max((number for _, number in found), default=0) + 1
    expected = [[(prompt.number, number) for number in range(each)] for prompt in prompts]
    every = {place for places in expected for place in places}
    missing, beyond = sorted(every - found.keys()), sorted(found.keys() - every)
    if missing or beyond:
        said = f"no image {missing[0][1]} of prompt {missing[0][0]}" if missing else str(found[beyond[0]])
        raise UserError(
            f"--images: found {said} in {folder} ({len(missing)} images are missing, {len(beyond)} are of no prompt), "
            f"expected {each} of each of {len(prompts)} prompts, both counted from 0"
        )
    return [[found[place] for place in places] for places in expected]


def _save(image: Path, target: Path) -> None:
    opened = read_image(image)
    if image.suffix.lower() == ".png":
        shutil.copyfile(image, target)
    else:
        opened.save(target)


def _asks(row: Mapping) -> bool:
    """Whether include and exclude are in GenEval's form; a position names an object before it in include."""
    include, exclude = row.get("include"), row.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        return False
    for place, asked in enumerate([*include, *exclude]):
        if not isinstance(asked, dict) or not isinstance(asked.get("class"), str):
            return False
        count, colour, position = asked.get("count"), asked.get("color", ""), asked.get("position", [RELATIONS[0], 0])
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or not isinstance(colour, str):
            return False
        if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
            return False
        if "position" in asked and (type(position[1]) is not int or not 0 <= position[1] < min(place, len(include))):
            return False
    return True
