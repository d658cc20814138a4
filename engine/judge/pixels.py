"""Turns images into the judge's input: resized to S x S, clamped to [0, 1] and normalised per channel.

Scoring and training differ in the published code, and here too. Scoring (`scoring_pixels`) resizes the short side,
crops the centre and clamps last; training (`training_pixels`) clamps, resizes to a square and clamps again. Both agree
for square images in [-1, 1] whose resizing does not overshoot. `resized_pixels` takes images of the right size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .model import StepAwarePreferenceModel


def scoring_pixels(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Converts images (N, 3, H, W) in about [-1, 1] to pixels (N, 3, S, S): short side to S, centre crop, clamp.

    float16 images are resized in float16, as published, all others in float32; the pixels are float32.
    """
    height, width = images.shape[-2:]
    ratio = judge.size / min(height, width)
    size = (int(height * ratio + 0.5), int(width * ratio + 0.5))
    images = images if images.dtype == torch.float16 else images.float()
    images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
    top, left = round((size[0] - judge.size) / 2), round((size[1] - judge.size) / 2)
    images = images[..., top : top + judge.size, left : left + judge.size]
    return _normalized(judge, (images / 2 + 0.5).clamp(0, 1).float())


def training_pixels(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Converts images (..., 3, H, W) in about [-1, 1] to pixels (..., 3, S, S): clamp, resize to a square, clamp."""
    flat = (images.flatten(0, -4).float() / 2 + 0.5).clamp(0, 1)
    flat = F.interpolate(flat, size=(judge.size, judge.size), mode="bicubic", align_corners=False).clamp(0, 1)
    return _normalized(judge, flat).unflatten(0, images.shape[:-3])


def resized_pixels(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Converts images (..., 3, S, S) in [-1, 1], as data/pair_files.py resizes them, to pixels of the same shape."""
    return _normalized(judge, images / 2 + 0.5)


def _normalized(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Normalises images (..., 3, S, S) in [0, 1] by the mean and std of the judge's CLIP."""
    return (images - judge.mean) / judge.std
