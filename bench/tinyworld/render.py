"""Draws scenes: 64x64 images of a known quality q.

High q: shading, a highlight, a drop shadow, a graded background, clean edges. Low q: grain, blotches, banding, edges of
3-pixel blocks. q has no first-order colour statistics: every field that q scales has zero mean over the region that it
acts on and scales a colour without turning its hue, so that the mean colour of an object or background does not tell q.
Layout (position, exact size, colour jitter) does not depend on q: the same generator state with another q gives the
same layout. q in (1, 1.5] exaggerates shading, shadow and grading; the examiners learn to call that 1.

The noise has cells of 4 to 13 pixels, so that an f = 4 autoencoder can carry it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from strop.bench.tinyworld.world import LAYOUTS, PALETTE, SHAPES, Scene

SIZE = 64  # pixels

SHADING, HIGHLIGHT, SHADOW, GRADING = 0.30, 0.45, 0.50, 0.22  # at q = 1, relative to the colour
GRAIN, BLOTCHES, CHROMA, BANDS = 0.065, 0.05, 0.035, 0.045  # at q = 0, standard deviations in [0, 1] units
TINT = 0.06  # of grey in what shading adds or takes, in [0, 1] units, so that black can be graded
BLOCK = 3  # pixels, the steps of a jagged edge at q = 0


@dataclass(frozen=True, slots=True)
class Objects:
    """Two object slots a scene, the second one absent in singles: centre (n, 2, 2) as x, y and radius (n, 2) in pixels,
    shape (n, 2) int64, colour (n, 2, 3), present (n, 2) bool."""

    centre: torch.Tensor
    radius: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    present: torch.Tensor


def _colours(names: list[str], rng: torch.Generator) -> torch.Tensor:
    """Draws palette colours (n, 3) with a small jitter: brightness, then each channel."""
    base = torch.tensor([PALETTE[name or "grey"] for name in names])
    tone = 1 + 0.05 * (2 * torch.rand(len(names), 1, generator=rng) - 1)
    return base * tone + 0.015 * (2 * torch.rand(len(names), 3, generator=rng) - 1)


def _place(scenes: list[Scene], rng: torch.Generator) -> Objects:
    """Draws positions and sizes that agree with the captions."""
    n = len(scenes)
    u = torch.rand(n, 8, generator=rng)
    layout = torch.tensor([LAYOUTS.index(s.layout) for s in scenes])
    size = torch.tensor([["", "small", "large"].index(s.size) for s in scenes])
    low = torch.tensor([9.5, 9.0, 18.5])[size]
    high = torch.tensor([22.0, 11.5, 23.0])[size]
    radius = torch.where(layout[:, None] == 0, (low + (high - low) * u[:, 0])[:, None], 9.0 + 3.0 * u[:, :2])  # (n, 2)
    room = (SIZE / 2 - 4 - radius[:, :1]).clamp(min=0)
    alone = SIZE / 2 + room * (2 * u[:, 2:4] - 1)  # (n, 2)
    along = torch.stack([16.5 + 3 * (2 * u[:, 4] - 1), 47.5 + 3 * (2 * u[:, 5] - 1)], 1)  # (n, 2): a, then b
    across = SIZE / 2 + 9 * (2 * u[:, 6:7] - 1) + torch.stack([3 * (2 * u[:, 7] - 1), 3 * (2 * u[:, 2] - 1)], 1)
    beside = torch.stack([along, across], -1)  # (n, 2 objects, xy)
    centre = torch.where(layout[:, None, None] == 1, beside, beside.flip(-1))
    centre = torch.where(layout[:, None, None] == 0, alone[:, None].expand(n, 2, 2), centre)
    shape = torch.tensor([[SHAPES.index(s.shape_a), SHAPES.index(s.shape_b or "circle")] for s in scenes])
    colour = torch.stack([_colours([s.colour_a for s in scenes], rng), _colours([s.colour_b for s in scenes], rng)], 1)
    present = torch.stack([torch.ones(n, dtype=torch.bool), layout > 0], 1)
    return Objects(centre, radius, shape, colour, present)


def distance(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Computes the signed distance in pixels to a shape's edge, from dx, dy (n, 64, 64) and radius, shape (n,)."""
    r = radius[:, None, None]
    circle = (dx * dx + dy * dy).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    triangle = torch.maximum(0.866 * dx.abs() - 0.5 * dy, dy) - 0.58 * r  # equilateral, tip up
    wide = torch.maximum(dx.abs() - r, dy.abs() - 0.38 * r)
    cross = torch.minimum(wide, torch.maximum(dx.abs() - 0.38 * r, dy.abs() - r))
    index = shape[:, None, None]
    return torch.where(index == 0, circle, torch.where(index == 1, square, torch.where(index == 2, triangle, cross)))


def _noise(n: int, channels: int, cells: int, rng: torch.Generator) -> torch.Tensor:
    """Draws smooth noise (n, channels, 64, 64) of `cells` x `cells` cells, with zero mean and unit deviation."""
    field = torch.randn(n, channels, cells, cells, generator=rng)
    field = F.interpolate(field, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    field = field - field.mean((2, 3), keepdim=True)
    return field / field.std((2, 3), keepdim=True)


def _centred(field: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Subtracts from `field` its mean under `weight`, both (n, 64, 64)."""
    total = weight.sum((1, 2), keepdim=True).clamp(min=1e-3)
    return field - (field * weight).sum((1, 2), keepdim=True) / total


def _tone(colour: torch.Tensor) -> torch.Tensor:
    """Returns the colour (n, 3, 1, 1) that shading adds or takes, with a little grey so that black can be graded."""
    return (colour + TINT)[:, :, None, None]


def _background(colour, shadow, outside, q, rng) -> torch.Tensor:
    """Draws (n, 3, 64, 64): smooth grading and shadows by q, banding by 1 - q; zero mean over the free background."""
    n = len(colour)
    line = torch.linspace(-1, 1, SIZE)
    angle = math.pi * (1.25 + 0.25 * (2 * torch.rand(n, 1, 1, generator=rng) - 1))  # light from the upper left
    ramp = torch.cos(angle) * line[None, None, :] + torch.sin(angle) * line[None, :, None]
    lit = (q * _centred(GRADING * ramp - SHADOW * shadow, outside))[:, None] * _tone(colour)
    turn = 2 * math.pi * torch.rand(n, 2, 1, 1, generator=rng)
    stripes = torch.cos(turn[:, 0]) * line[None, None, :] + torch.sin(turn[:, 0]) * line[None, :, None]
    bands = torch.tanh(4 * torch.sin(13 * stripes + turn[:, 1]))
    rough = ((1 - q).clamp(min=0) * BANDS * _centred(bands, outside))[:, None]
    return colour[:, :, None, None] + lit + rough


def _surface(colour, dx, dy, radius, mask, q) -> torch.Tensor:
    """Draws (n, 3, 64, 64): an object's colour with shading and a highlight by q, zero mean over its mask."""
    u, v = dx / radius[:, None, None], dy / radius[:, None, None]
    slope = -(0.62 * u + 0.70 * v) - 0.55 * (u * u + v * v)
    shading = (q * SHADING * _centred(slope, mask))[:, None] * _tone(colour)
    spot = torch.exp(-((u + 0.30) ** 2 + (v + 0.36) ** 2) / (2 * 0.17**2))
    highlight = (q * HIGHLIGHT * _centred(spot, mask))[:, None] * (0.95 - colour)[:, :, None, None]
    return colour[:, :, None, None] + shading + highlight


def render(scenes: list[Scene], q: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Draws images (n, 3, 64, 64) in [-1, 1] of n scenes with qualities q (n,) in [0, 1.5]; rng decides the rest."""
    n = len(scenes)
    q = q.float().reshape(n, 1, 1)
    rough = (1 - q).clamp(min=0)
    objects = _place(scenes, rng)
    ground = _colours([s.background for s in scenes], rng)
    phase = BLOCK * torch.rand(n, 2, 1, 1, generator=rng)
    axis = torch.arange(SIZE) + 0.5
    x = axis[None, None, :].expand(n, SIZE, SIZE)
    y = axis[None, :, None].expand(n, SIZE, SIZE)
    # Jagged: an edge is looked up at the centre of its block; between 0 and 1, part of the way there.
    jag_x = x + rough * (((x + phase[:, 0]) / BLOCK).floor() * BLOCK + BLOCK / 2 - phase[:, 0] - x)
    jag_y = y + rough * (((y + phase[:, 1]) / BLOCK).floor() * BLOCK + BLOCK / 2 - phase[:, 1] - y)

    masks, surfaces = [], []
    shadow = torch.zeros(n, SIZE, SIZE)
    for i in range(2):
        cx, cy = objects.centre[:, i, 0, None, None], objects.centre[:, i, 1, None, None]
        r, shape, here = objects.radius[:, i], objects.shape[:, i], objects.present[:, i, None, None]
        cy = cy + torch.where(shape == 2, 0.22 * r, 0.0 * r)[:, None, None]  # centre its box, not its centroid
        mask = (0.5 - distance(jag_x - cx, jag_y - cy, r, shape)).clamp(0, 1) * here
        off = r[:, None, None]
        under = distance(x - cx - 0.22 * off, y - cy - 0.26 * off, r, shape)
        shadow = torch.maximum(shadow, torch.sigmoid(-under / (0.13 * off)) * here)
        masks.append(mask)
        surfaces.append(_surface(objects.colour[:, i], x - cx, y - cy, r, mask, q))
    outside = (1 - masks[0]) * (1 - masks[1])
    image = _background(ground, shadow, outside, q, rng)
    for mask, surface in zip(masks, surfaces, strict=True):
        image = image + mask[:, None] * (surface - image)
    grain = GRAIN * _noise(n, 1, 15, rng) + BLOTCHES * _noise(n, 1, 5, rng) + CHROMA * _noise(n, 3, 12, rng)
    image = image + rough[:, None] * grain
    return (2 * image - 1).clamp(-1, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Converts floats in [-1, 1] to 0..255, for storing."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Converts 0..255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def contact_sheet(images: torch.Tensor, columns: int, scale: int = 2) -> torch.Tensor:
    """Joins images (n, 3, h, w) in [-1, 1] to a uint8 image (H, W, 3), row by row, enlarged, with a white gap."""
    tiles = F.pad(F.interpolate(images.clamp(-1, 1), scale_factor=scale, mode="nearest"), (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(row), 2) for row in tiles.split(columns) if len(row) == columns]
    return to_uint8(torch.cat(rows, 1)).permute(1, 2, 0).contiguous()
