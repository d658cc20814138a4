"""What a scorer is, and what scorers share: how they run, images as PIL has them, batches.

A scorer grades finished images against their prompts and trains nothing. Each has a file of its own beside this one
and reads the weights of its authors; scorers/find.py finds one by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..models.hub import fetch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai's
OPENAI_CLIP = "openai/clip-vit-large-patch14"


class Scorer(Protocol):
    """A scorer grades image n against prompt n; a factory of `evaluate.scorers` may return one."""

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns {name: scores (N,)}, on the scorer's device, in float32 (float64 if it runs in that).

        images: N images of PIL in any mode and size, or a tensor (N, 3, H, W) in [-1, 1], as the evaluator has them.
        Raises ValueError unless there are as many prompts as images, and at least one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """How a scorer runs: its device, the type that its networks compute in, the images of one forward."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 16


DEFAULTS = Options()


def in_batches(
    score: Callable[[list[Image.Image], list[str]], Tensor],
    images: Tensor | Sequence[Image.Image],
    prompts: Sequence[str],
    batch: int,
) -> Tensor:
    """Returns the scores (N,) of N images and prompts, of which `score` sees at most `batch` at a time."""
    if len(images) != len(prompts) or not len(prompts):
        raise ValueError(f"a scorer needs an image for each prompt, got {len(images)} images, {len(prompts)} prompts")
    parts = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            parts.append(score(pil_images(images[part]), list(prompts[part])))
    scores = torch.cat(parts)
    return scores if scores.dtype == torch.float64 else scores.float()


def pil_images(images: Tensor | Sequence[Image.Image]) -> list[Image.Image]:
    """Returns images as PIL has them. A tensor (N, 3, H, W) in [-1, 1] becomes bytes as diffusers saves them.

    An image has the score of its PNG.
    """
    if not isinstance(images, Tensor):
        return list(images)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"a scorer needs images (N, 3, H, W), got {tuple(images.shape)}")
    pixels = levels(images.float()).to("cpu", torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]  # (N, H, W, 3)


def levels(images: Tensor) -> Tensor:
    """Rounds images in [-1, 1] to what 8 bits a channel store, 0 to 255; a half to the even neighbour."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round()


def fetch_published(path: str, patterns: Sequence[str], key: str, source: str) -> Path:
    """Returns the file or folder of `path`, as models/hub.py does; its UserError ends with `source`.

    source: a sentence without its full stop, of what is published where.
    """
    try:
        return fetch(path, None, key, patterns)
    except UserError as error:
        raise UserError(f"{error}; {source}") from None


def find_file(path: str, name: str, key: str, source: str) -> Path:
    """Finds a file of weights: `path` is the file, a folder that holds `name`, or a hub id with or without a file.

    source: where its authors publish it. Raises UserError that says what is missing, and where it comes from.
    """
    found = fetch_published(path, (name,), key, f"{name} comes from {source}")
    if found.is_dir() and not (found / name).is_file():
        raise UserError(f"{key}: {found} has no file {name}, which comes from {source}")
    return found / name if found.is_dir() else found
