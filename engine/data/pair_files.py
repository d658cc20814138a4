"""Reads preference pairs from a folder of Pick-a-Pic parquet files or from a .jsonl file.

A source holds captions, labels and the place of each row; images are read when they are asked for, one row group of a
parquet file at a time, because Pick-a-Pic is far larger than memory. Rows that cannot be used are listed with a reason;
pair_scan.py decides how many of them a run accepts. pair_sets.py handles a `module:factory` of pairs.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from PIL import Image
from pyarrow import ArrowException
from torch import Tensor

from ..errors import UserError, one_line, short
from ..user_files import is_text, parse_json, read_bytes
from .image_files import MOST_BYTES, decoded, read_image

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
OPTIONAL_COLUMNS = ("num_example_per_prompt", "has_label", "are_different")  # of Pick-a-Pic
FOOTER = 2**16  # bytes
JSONL_GROUP = 16  # consecutive rows that one process reads


class BrokenPair(UserError):
    """Says which row is no pair or has unreadable images, and why. The scan before training catches it and lists the
    row; later it ends the run, because the row was whole when the run began."""


@dataclass(slots=True)
class PairSource(ABC):
    """A source of n pairs.

    captions: n texts. labels: n tuples that sum to 1, a tie is (0.5, 0.5); None if they are not asked for.
    num_examples: how many pairs share each caption. broken: "file row: why" of rows that are no pairs. left_out: how
    many rows have no label or equal images.
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
        """Returns the row's file and place in it, for messages."""

    @abstractmethod
    def group(self, row: int) -> tuple[int, int]:
        """Returns the group of neighbouring rows that this row is in; one process should read a group in order."""

    def images(self, row: int) -> list[Image.Image]:
        """Reads both images in RGB. Raises BrokenPair."""
        return self._or_raise_broken(self._images, row)

    def identity(self, row: int) -> list:
        """Returns JSON values that identify this row's images; they change if the images change.

        Raises BrokenPair if a file is missing.
        """
        return self._or_raise_broken(self._identity, row)

    @abstractmethod
    def contents(self) -> list:
        """Returns JSON values that tell where in the files each row is, and that change with a parquet file."""

    @abstractmethod
    def _images(self, row: int) -> list[Image.Image]: ...

    @abstractmethod
    def _identity(self, row: int) -> list: ...

    def _or_raise_broken(self, action: Callable[[int], list], row: int) -> list:
        try:
            return action(row)
        except (OSError, ValueError, ArrowException) as error:
            raise BrokenPair(f"{self.name(row)}: {_reason(error)}") from None

    def _append(self, caption: object, label: tuple | None) -> str:
        """Adds a row's caption and label; returns what is wrong with them, or an empty text."""
        if not is_text(caption):
            return "no caption" if not isinstance(caption, str) else f"its caption is no text ({short(caption)})"
        if label is not None:
            if len(label) == 1:
                return f'its label is {short(label[0])}, expected 0, 1 or "tie"'
            numbers = all(isinstance(part, int | float) and 0 <= part <= 1 for part in label)
            if not numbers or abs(sum(label) - 1) > 1e-6:
                return f"its labels are {short(label[0])} and {short(label[1])}, expected two numbers of sum 1"
            label = (float(label[0]), float(label[1]))
        self.captions.append(caption)
        self.labels.append(label)
        return ""

    def count_examples(self) -> None:
        """Fills num_examples by counting equal captions."""
        counts = Counter(self.captions)
        self.num_examples = [counts[caption] for caption in self.captions]


@dataclass(slots=True)
class ParquetPairs(PairSource):
    """Pairs in parquet files in the format of Pick-a-Pic, in the order of the files' names.

    As in PickScore's training, rows without a label are left out (unless labels are not asked for), and so are pairs
    whose images do not differ.
    """

    files: list[Path] = field(default_factory=list)
    stamps: list[list] = field(default_factory=list)  # of each file, JSON values that change with it
    places: list[tuple[int, int, int]] = field(default_factory=list)  # file, row group, row in the group
    _read_group: tuple | None = None  # process, file, row group, its table

    @classmethod
    def open(cls, files: list[Path], key: str, labelled: bool) -> ParquetPairs:
        """Reads all columns except the images. Raises UserError that names the file or column at fault."""
        source = cls(files=sorted(files))
        for number in range(len(source.files)):
            source._index(number, key, labelled)
        if len(source.num_examples) < len(source):
            source.count_examples()
        return source

    def _index(self, number: int, key: str, labelled: bool) -> None:
        try:
            self.stamps.append(_stamp(self.files[number]))
            with parquet.ParquetFile(self.files[number]) as file:
                self._index_file(number, file, key, labelled)
        except (ArrowException, OSError, ValueError) as error:
            raise UserError(f"{key}: {self.files[number]} cannot be read as parquet ({_reason(error)})") from None

    def _index_file(self, number: int, file: parquet.ParquetFile, key: str, labelled: bool) -> None:
        present = file.schema_arrow.names
        needed = ["caption", *(LABELS if labelled else ())]
        missing = [name for name in (*IMAGES, *needed) if name not in present]
        if missing:
            raise UserError(
                f"{key}: {self.files[number]} has no column {', '.join(missing)}; it has {', '.join(present)}"
            )
        columns = needed + [name for name in OPTIONAL_COLUMNS if name in present]
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
        return [*self.stamps[number], *place]

    def contents(self) -> list:
        return [self.places, [(size, footer) for _, size, _, footer in self.stamps]]

    def group(self, row: int) -> tuple[int, int]:
        return self.places[row][:2]

    def _images(self, row: int) -> list[Image.Image]:
        number, group, place = self.places[row]
        place_of_group = (os.getpid(), number, group)
        if self._read_group is None or self._read_group[:3] != place_of_group:
            with parquet.ParquetFile(self.files[number]) as file:
                table = file.read_row_group(group, columns=list(IMAGES), use_threads=False)
            self._read_group = (*place_of_group, table)
        return [_decoded(self._read_group[3].column(name)[place].as_py(), name) for name in IMAGES]


@dataclass(slots=True)
class JsonlPairs(PairSource):
    """A file with one pair a line: {"image_0": path, "image_1": path, "caption": text, "label": 0, 1 or "tie"}.

    Paths are relative to the file. `label` names the preferred image; label_0 and label_1, which sum to 1, may stand in
    its place. num_examples may be stated; otherwise the lines with the same caption are counted.
    """

    folder: Path = Path()
    file: str = ""
    lines: list[int] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, key: str, labelled: bool) -> JsonlPairs:
        """Reads the lines, not the images. Raises UserError if the file cannot be read."""
        source = cls(folder=path.parent, file=path.name)
        try:
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        source._index(number, line, labelled)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {path} cannot be read ({_reason(error)}); expected JSON lines in UTF-8") from None
        stated = source.num_examples
        source.count_examples()
        source.num_examples = [a or b for a, b in zip(stated, source.num_examples, strict=True)]
        return source

    def _index(self, number: int, line: str, labelled: bool) -> None:
        row, why = _parsed(line)
        num_examples = row.get("num_examples")
        if num_examples is not None and (not isinstance(num_examples, int) or not 1 <= num_examples < 2**31):
            why = f"its num_examples is {short(num_examples)}, expected a whole number from 1"
        why = why or self._append(row["caption"], _label(row) if labelled else None)
        if why:
            self.broken.append(f"{self.file} line {number}: {why}")
            return
        self.lines.append(number)
        self.paths.append((row["image_0"], row["image_1"]))
        self.num_examples.append(num_examples or 0)

    def name(self, row: int) -> str:
        return f"{self.file} line {self.lines[row]}"

    def _identity(self, row: int) -> list:
        contents = (read_bytes(self.folder / path, MOST_BYTES) for path in self.paths[row])
        return [hashlib.blake2b(content, digest_size=20).hexdigest() for content in contents]

    def contents(self) -> list:
        return self.paths

    def group(self, row: int) -> tuple[int, int]:
        return (0, row // JSONL_GROUP)

    def _images(self, row: int) -> list[Image.Image]:
        return [read_image(self.folder / path, path) for path in self.paths[row]]


def open_source(spec: str, key: str, labelled: bool) -> PairSource:
    """Opens parquet files (a folder, or a pattern such as folder/train-*.parquet) or a .jsonl file of pairs.

    key: the configuration key of `spec`, for messages; labelled: whether rows must have labels. Raises UserError if
    `spec` names neither.
    """
    path = Path(spec)
    if path.suffix == ".jsonl" and path.is_file():
        return JsonlPairs.open(path, key, labelled)
    if path.is_dir() or "*" in path.name:
        found = path.rglob("*.parquet") if path.is_dir() else path.parent.glob(path.name)
        files = [file for file in found if file.is_file()]
        if not files:
            raise UserError(f"{key}: {spec} holds no .parquet file; expected those of Pick-a-Pic")
        return ParquetPairs.open(files, key, labelled)
    raise UserError(
        f"{key}: {spec} is no folder of Pick-a-Pic parquet files, no .jsonl file and no module:factory of pairs"
    )


def is_factory(spec: str) -> bool:
    """Whether `spec` names code, such as strop.bench.tinyworld.pairs:load, and not files."""
    return ":" in spec and not Path(spec).exists()


def resized(image: Image.Image, height: int, width: int) -> Tensor:
    """Converts an image to (3, height, width) in [-1, 1] by PIL's bicubic resizing and a centre crop.

    For a square this is what CLIP's image processor does. What is resized and cropped away is not much, because
    image_files.py refuses long strips.
    """
    size, (left, top) = _placed(image, height, width)
    image = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def frame(image: Image.Image, height: int, width: int) -> Tensor:
    """Returns what `resized` leaves of an image: its height and width, and the crop's top and left after resizing."""
    _, (left, top) = _placed(image, height, width)
    return torch.tensor([image.height, image.width, top, left])


def _placed(image: Image.Image, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the (width, height) to which an image is resized, and the (left, top) of the crop from that."""
    if image.width * height >= image.height * width:
        size = (image.width * height // image.height, height)
    else:
        size = (width, image.height * width // image.width)
    return size, ((size[0] - width) // 2, (size[1] - height) // 2)


def _parsed(line: str) -> tuple[dict, str]:
    """Parses a line of JSON; returns the object and what is wrong with it, or an empty text."""
    try:
        row = parse_json(line)
    except ValueError as error:
        return {}, f"not JSON ({one_line(error)})"
    if not isinstance(row, dict):
        return {}, "no object of image_0, image_1, caption and label"
    missing = [name for name in ("image_0", "image_1", "caption") if not isinstance(row.get(name), str)]
    return row, f"no text under {', '.join(missing)}" if missing else ""


def _label(row: dict) -> tuple:
    """Returns the labels that `label` means, or label_0 and label_1 if there is no `label`."""
    if "label" not in row:
        return row.get("label_0"), row.get("label_1")
    meanings = {"0": (1, 0), "1": (0, 1), "tie": (0.5, 0.5)}
    return meanings.get(str(row["label"]), (row["label"],))


def _decoded(content: bytes | dict | None, name: str) -> Image.Image:
    """Decodes the image of a file's bytes, or of the {bytes, path} that the library `datasets` writes."""
    return decoded((content.get("bytes") if isinstance(content, dict) else content) or b"", name)


def _stamp(path: Path) -> list:
    """Returns a parquet file's place, size, time of last change, and a hash of the end of it.

    There it says where each column of each row group lies and what its smallest and largest values are. The images
    themselves are too many to be read at every start.
    """
    state = path.stat()
    with path.open("rb") as file:
        file.seek(max(0, state.st_size - FOOTER))
        footer = hashlib.blake2b(file.read(), digest_size=20).hexdigest()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns, footer]


def _reason(error: Exception) -> str:
    """Returns an error's message in one line; of an OSError, the file and what went wrong without the error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error)
