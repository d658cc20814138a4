"""Preference pairs in files: what a folder of Pick-a-Pic parquet files or a .jsonl file holds, without its images.

A source knows captions, labels and where each row lies; an image is read when it is asked for, one row group of a
parquet file at a time, for Pick-a-Pic is far larger than memory. A row that cannot be used is named, never dropped in
silence; how many of them a run bears is decided by pair_survey.py. A `module:factory` of pairs is pair_sets.py's.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from PIL import Image
from pyarrow import ArrowException
from torch import Tensor

from ..errors import UserError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
OPTIONAL = ("num_example_per_prompt", "has_label", "are_different")  # of Pick-a-Pic
JSONL_GROUP = 16  # rows that one process reads in a row


class BrokenPair(UserError):
    """A row that is no pair, or whose images cannot be read: where it lies, and why. It ends a run only where it was
    whole when the run began."""


@dataclass(slots=True)
class PairSource(ABC):
    """n pairs: caption, labels and number of examples of each; `left_out` rows of the data teach nothing.

    labels: n tuples that sum to 1, a tie is (0.5, 0.5); None where they are not asked for. num_examples: how many pairs
    have the caption of this one. broken: "file row: why" of the rows that are no pairs.
    """

    captions: list[str] = field(default_factory=list)
    labels: list[tuple[float, float] | None] = field(default_factory=list)
    num_examples: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    @abstractmethod
    def name(self, row: int) -> str:
        """Where the row lies, as a person would look it up."""

    @abstractmethod
    def group(self, row: int) -> tuple[int, int]:
        """Rows of one group, which are neighbours, are read best by one process and one after the other."""

    def images(self, row: int) -> list[Image.Image]:
        """Both images, in RGB. Raises BrokenPair."""
        return self._or_broken(self._images, row)

    def identity(self, row: int) -> list:
        """What tells the images of this row from all others, and from those that the same files held before.

        Raises BrokenPair where a file is missing.
        """
        return self._or_broken(self._identity, row)

    @abstractmethod
    def _images(self, row: int) -> list[Image.Image]: ...

    @abstractmethod
    def _identity(self, row: int) -> list: ...

    def _or_broken(self, action: Callable[[int], list], row: int) -> list:
        try:
            return action(row)
        except (OSError, ValueError, ArrowException) as error:
            raise BrokenPair(f"{self.name(row)}: {_line(error)}") from None

    def _append(self, caption: object, label: tuple | None) -> str:
        """Adds what every row has, or says what is wrong with it."""
        if not isinstance(caption, str):
            return "no caption"
        if label is not None:
            if len(label) == 1:
                return f'its label is {label[0]!r}, expected 0, 1 or "tie"'
            numbers = all(isinstance(part, int | float) and 0 <= part <= 1 for part in label)
            if not numbers or abs(sum(label) - 1) > 1e-6:
                return f"its labels are {label[0]} and {label[1]}, expected two numbers of sum 1"
            label = (float(label[0]), float(label[1]))
        self.captions.append(caption)
        self.labels.append(label)
        return ""

    def count_examples(self) -> None:
        """Fills num_examples for data that does not tell them."""
        counts = Counter(self.captions)
        self.num_examples = [counts[caption] for caption in self.captions]


@dataclass(slots=True)
class ParquetPairs(PairSource):
    """Parquet files in the form of Pick-a-Pic, in the order of their names.

    As PickScore's training offers, rows without a label are left out, unless labels are not asked for, and so are pairs
    whose images do not differ.
    """

    files: list[Path] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)  # file, row group, row in the group
    _read: tuple | None = None  # process, file, row group, its table

    @classmethod
    def open(cls, files: list[Path], key: str, labelled: bool) -> ParquetPairs:
        """Reads all columns but the images. Raises UserError naming the file or column at fault."""
        source = cls(files=sorted(files))
        for number in range(len(source.files)):
            source._index(number, key, labelled)
        if len(source.num_examples) < len(source):
            source.count_examples()
        return source

    def _index(self, number: int, key: str, labelled: bool) -> None:
        try:
            with parquet.ParquetFile(self.files[number]) as file:
                self._index_file(number, file, key, labelled)
        except (ArrowException, OSError) as error:
            raise UserError(f"{key}: {self.files[number]} cannot be read as parquet ({_line(error)})") from None

    def _index_file(self, number: int, file: parquet.ParquetFile, key: str, labelled: bool) -> None:
        there = file.schema_arrow.names
        needed = ["caption", *(LABELS if labelled else ())]
        missing = [name for name in (*IMAGES, *needed) if name not in there]
        if missing:
            raise UserError(
                f"{key}: {self.files[number]} has no column {', '.join(missing)}; it has {', '.join(there)}"
            )
        columns = needed + [name for name in OPTIONAL if name in there]
        for group in range(file.num_row_groups):
            for place, row in enumerate(file.read_row_group(group, columns=columns, use_threads=False).to_pylist()):
                if row.get("are_different") == 0 or (labelled and row.get("has_label") == 0):
                    self.left_out += 1
                    continue
                why = self._append(row["caption"], (row[LABELS[0]], row[LABELS[1]]) if labelled else None)
                if why:
                    self.broken.append(f"{self.files[number].name} row group {group} row {place}: {why}")
                    continue
                self.places.append((number, group, place))
                if row.get("num_example_per_prompt"):
                    self.num_examples.append(int(row["num_example_per_prompt"]))

    def name(self, row: int) -> str:
        number, group, place = self.places[row]
        return f"{self.files[number].name} row group {group} row {place}"

    def _identity(self, row: int) -> list:
        number, *place = self.places[row]
        return [self.files[number].name, *_stamp(self.files[number]), *place]

    def group(self, row: int) -> tuple[int, int]:
        return self.places[row][:2]

    def _images(self, row: int) -> list[Image.Image]:
        number, group, place = self.places[row]
        here = (os.getpid(), number, group)
        if self._read is None or self._read[:3] != here:
            with parquet.ParquetFile(self.files[number]) as file:
                self._read = (*here, file.read_row_group(group, columns=list(IMAGES), use_threads=False))
        return [_opened(self._read[3].column(name)[place].as_py(), name) for name in IMAGES]


@dataclass(slots=True)
class JsonlPairs(PairSource):
    """A file of one pair a line: {"image_0": path, "image_1": path, "caption": text, "label": 0, 1 or "tie"}.

    Paths are relative to the file. `label` names the preferred image; label_0 and label_1, which sum to 1, may stand in
    its place. num_examples may be given; otherwise the lines with the same caption are counted.
    """

    folder: Path = Path()
    file: str = ""
    lines: list[int] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, key: str, labelled: bool) -> JsonlPairs:
        """Reads the lines, not the images. Raises UserError where the file itself cannot be read."""
        source = cls(folder=path.parent, file=path.name)
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        source._index(number, line, labelled)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {path} cannot be read ({_line(error)}); expected JSON lines in UTF-8") from None
        given = source.num_examples
        source.count_examples()
        source.num_examples = [a or b for a, b in zip(given, source.num_examples, strict=True)]
        return source

    def _index(self, number: int, line: str, labelled: bool) -> None:
        row, why = _parsed(line)
        given = row.get("num_examples")
        if given is not None and (not isinstance(given, int) or given < 1):
            why = f"its num_examples is {given!r}, expected a whole number from 1"
        why = why or self._append(row["caption"], _label(row) if labelled else None)
        if why:
            self.broken.append(f"{self.file} line {number}: {why}")
            return
        self.lines.append(number)
        self.paths.append((row["image_0"], row["image_1"]))
        self.num_examples.append(given or 0)

    def name(self, row: int) -> str:
        return f"{self.file} line {self.lines[row]}"

    def _identity(self, row: int) -> list:
        return [part for path in self.paths[row] for part in (path, *_stamp(self.folder / path))]

    def group(self, row: int) -> tuple[int, int]:
        return (0, row // JSONL_GROUP)

    def _images(self, row: int) -> list[Image.Image]:
        return [_opened((self.folder / path).read_bytes(), path) for path in self.paths[row]]


def open_source(spec: str, key: str, labelled: bool) -> PairSource:
    """The pairs of parquet files (a folder, or a pattern such as folder/train-*.parquet) or of a .jsonl file.

    key: where in the configuration it stands, for the message; labelled: whether rows must have labels. Raises
    UserError where there is nothing of the kind.
    """
    path = Path(spec).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        return JsonlPairs.open(path, key, labelled)
    if path.is_dir() or "*" in path.name:
        files = list(path.rglob("*.parquet") if path.is_dir() else path.parent.glob(path.name))
        if not files:
            raise UserError(f"{key}: {spec} holds no .parquet file; expected those of Pick-a-Pic")
        return ParquetPairs.open(files, key, labelled)
    raise UserError(
        f"{key}: {spec} is no folder of Pick-a-Pic parquet files, no .jsonl file and no module:factory of pairs"
    )


def is_factory(spec: str) -> bool:
    """Whether `spec` names code, such as strop.bench.tinyworld.pairs:load, and not files."""
    return ":" in spec and not Path(spec).expanduser().exists()


def fitted(image: Image.Image, height: int, width: int) -> Tensor:
    """The image (3, height, width) in [-1, 1]: resized by PIL (bicubic) until it covers that size, centre cropped.

    For a square it is what CLIP's image processor does: short side to the size, then a centre crop.
    """
    if image.width * height >= image.height * width:
        size = (image.width * height // image.height, height)
    else:
        size = (width, image.height * width // image.width)
    image = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _parsed(line: str) -> tuple[dict, str]:
    """A line of JSON, and what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    if not isinstance(row, dict):
        return {}, "no object of image_0, image_1, caption and label"
    missing = [name for name in ("image_0", "image_1", "caption") if not isinstance(row.get(name), str)]
    return row, f"no text under {', '.join(missing)}" if missing else ""


def _label(row: dict) -> tuple:
    """What `label` says, or label_0 and label_1 where there is none."""
    if "label" not in row:
        return row.get("label_0"), row.get("label_1")
    known = {"0": (1, 0), "1": (0, 1), "tie": (0.5, 0.5)}
    return known.get(str(row["label"]), (row["label"],))


def _opened(content: bytes | dict | None, name: str) -> Image.Image:
    """The decoded image of a file's bytes, or of the {bytes, path} that the library `datasets` writes."""
    content = content.get("bytes") if isinstance(content, dict) else content
    if not content:
        raise ValueError(f"{name} is empty")
    try:
        return Image.open(BytesIO(content)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "is no image" if isinstance(error, Image.UnidentifiedImageError) else f"is damaged ({_line(error)})"
        raise ValueError(f"{name} {why}") from None


def _stamp(path: Path) -> list:
    """Size and time of the last change of a file: another content under the same name has another stamp."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
