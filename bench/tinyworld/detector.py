"""Finds the objects of a tinyworld picture from its pixels: shape, colour and box, without any network.

render.py shades a colour by adding multiples of (colour + grey): a shaded pixel keeps its direction from one dark
point. Pixels are told apart by that direction, connected ones of one colour are an object, and its shape is the one
that covers it best. What is grey or has the background's colour is no object. Sizes and quality are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from strop.bench.tinyworld.render import SIZE, TINT, distance
from strop.bench.tinyworld.world import BACKGROUNDS, OBJECT_COLOURS, PALETTE, SHAPES

FEWEST = 70  # pixels of an object; the smallest triangle has about 140
FIT = 0.70  # intersection over union with the best shape, below which there is no object
SCALES = (0.94, 1.0, 1.06, 1.12)  # of the radius that gives a mask's area
AREAS = {"circle": 3.142, "square": 3.098, "triangle": 1.748, "cross": 2.462}  # over radius squared, of render.distance


@dataclass(frozen=True, slots=True)
class Found:
    """An object: shape and colour, box (left, top, right, bottom) in pixels, and how well the shape fits, 0 to 1."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    fit: float


def detect(images: Tensor) -> list[list[Found]]:
    """Returns the objects of each image (n, 3, 64, 64) in [-1, 1], the best fitting first."""
    pixels = _blurred((images.detach().float().cpu() + 1) / 2)
    labels = _labels(pixels)  # (n, 64, 64)
    return [_objects(image, label) for image, label in zip(pixels.numpy(), labels.numpy(), strict=True)]


def _labels(pixels: Tensor) -> Tensor:
    """Returns the direction (n, 64, 64) nearest to pixels (n, 3, 64, 64), as a place in OBJECT_COLOURS; grey is 6."""
    directions = torch.tensor([PALETTE[name] for name in (*OBJECT_COLOURS, "grey")]) + TINT
    directions = directions / directions.norm(dim=1, keepdim=True)
    nearest = torch.einsum("kc,nchw->nkhw", directions, pixels + TINT).argmax(1)
    votes = F.one_hot(nearest, len(directions)).permute(0, 3, 1, 2).float()
    return _blurred(votes).argmax(1)  # thin rims of mixed colours go


def _objects(pixels: np.ndarray, labels: np.ndarray) -> list[Found]:
    """Returns the objects of one image from pixels (3, 64, 64) in [0, 1] and the direction of each."""
    border = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()])
    background = np.bincount(border).argmax()
    found = []
    for label in range(len(OBJECT_COLOURS)):
        if label == background:
            continue
        parts, count = ndimage.label(labels == label)
        for part in range(1, count + 1):
            mask = ndimage.binary_fill_holes(parts == part)  # a highlight is no hole
            if mask.sum() >= FEWEST:
                shape, fit = _shape(mask)
                if fit >= FIT:
                    found.append(Found(shape, _colour(pixels, mask), _box(mask), fit))
    return sorted(found, key=lambda one: -one.fit)


def _shape(mask: np.ndarray) -> tuple[str, float]:
    """Returns the shape that covers a mask (64, 64) best, of those of about its area at its place, and how well.

    The shapes lose their corners as the mask did.
    """
    axis = torch.arange(SIZE) + 0.5
    rows, columns = np.nonzero(mask)
    centre_x, centre_y = columns.mean() + 0.5, rows.mean() + 0.5  # dx, dy = 0 is every shape's centroid
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(SCALES))
    equal = torch.tensor([(mask.sum() / AREAS[name]) ** 0.5 for name in SHAPES], dtype=torch.float32)
    radius = equal[shape] * torch.tensor(SCALES).repeat(len(SHAPES))
    dx = (axis - centre_x)[None, None, :].expand(len(shape), SIZE, SIZE)
    dy = (axis - centre_y)[None, :, None].expand(len(shape), SIZE, SIZE)
    ideal = (0.5 - distance(dx, dy, radius, shape)).clamp(0, 1)
    ideal = _blurred((_blurred(ideal[:, None]) > 0.5).float()).numpy()[:, 0] > 0.5
    fits = (ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2))
    best = int(fits.argmax())
    return SHAPES[int(shape[best])], float(fits[best])


def _blurred(images: Tensor) -> Tensor:
    """Means over 3x3 pixels of images (n, c, 64, 64)."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _colour(pixels: np.ndarray, mask: np.ndarray) -> str:
    """Returns the colour nearest to the mean over a mask, its rim left out: shading has zero mean over an object."""
    core = ndimage.binary_erosion(mask, iterations=2)
    mean = pixels[:, core if core.any() else mask].mean(1)
    return min(BACKGROUNDS, key=lambda name: float(np.square(mean - PALETTE[name]).sum()))


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
