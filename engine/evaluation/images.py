"""The drawn images of an evaluation as files: DIR/images/<system>/<prompt number>-<seed>.png, or as GenEval has them.

A file is written whole or not at all, so that whatever is there is finished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.image_files import BrokenImage, image_size, read_image
from ..errors import UserError, one_line
from ..scorers.scorer import pil_images
from .geneval import Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are drawn and scored together: image `seed` of the prompts of these numbers."""

    numbers: range
    seed: int


def batches(prompts: int, seeds: int, size: int) -> list[Batch]:
    """Cuts the images into batches that depend on prompt numbers alone, so that ranks and resuming change no bit."""
    starts = range(0, prompts, size)
    return [Batch(range(start, min(start + size, prompts)), seed) for seed in range(seeds) for start in starts]


@dataclass(frozen=True, slots=True)
class Images:
    """The image files below a folder; geneval: the prompts, if images are to lie as GenEval's script reads them."""

    root: Path
    geneval: Sequence[Prompt] = ()

    def file(self, system: str, number: int, seed: int) -> Path:
        """Returns the path of image `seed` of prompt `number`, below `root`."""
        folder = self.root / "images" / system
        return self.geneval[number].sample(folder, seed) if self.geneval else folder / f"{number:05d}-{seed}.png"

    def files(self, system: str, batch: Batch) -> Iterator[Path]:
        """Yields the paths of the images of a batch."""
        return (self.file(system, number, batch.seed) for number in batch.numbers)

    def has(self, system: str, batch: Batch) -> bool:
        """Whether every image of a batch is there."""
        return all(file.is_file() for file in self.files(system, batch))

    def check(self, system: str, batch: Batch, size: tuple[int, int]) -> None:
        """Raises UserError for an image that is there and not `size` (height, width), or cannot be read."""
        for file in filter(Path.is_file, self.files(system, batch)):
            width, height = _readable(image_size, file)
            if (height, width) != size:
                raise UserError(
                    f"{file} has {height}x{width} pixels, expected {size[0]}x{size[1]} as {system} draws them by this "
                    "protocol; remove it, or choose another --out"
                )

    def write(self, system: str, batch: Batch, images: Tensor) -> None:
        """Writes images (N, 3, H, W) in [-1, 1]. Raises UserError where that is impossible."""
        for file, image in zip(self.files(system, batch), pil_images(images), strict=True):
            unfinished = file.with_suffix(f".{os.getpid()}.tmp")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(unfinished, "PNG")
                unfinished.replace(file)
            except OSError as error:
                raise UserError(
                    f"{file} cannot be written ({one_line(error)}); the same command goes on from here"
                ) from None

    def read(self, system: str, batch: Batch) -> Tensor:
        """Reads images as (N, 3, H, W) in [-1, 1], equal to those that the evaluator scores."""
        arrays = [np.asarray(_readable(read_image, file)) for file in self.files(system, batch)]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, H, W)


def _readable(read: Callable[[Path], T], file: Path) -> T:
    """Calls read(file). Raises UserError, which says how the image is had again."""
    try:
        return read(file)
    except BrokenImage as error:
        raise UserError(f"{error}; remove it, and it is drawn again") from None
