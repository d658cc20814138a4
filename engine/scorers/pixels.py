"""Turns images into what vision towers see: PIL's bicubic resize of the short side, a centre crop, mean and std.

The published scorers differ in which pixel an odd margin loses, and in when an image becomes RGB: `hugging_face` and
`openai` are the two ways. HPS has a third, in scorers/hpsv2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

ToBytes = Callable[[Image.Image, int], Tensor]


def hugging_face(image: Image.Image, size: int) -> Tensor:
    """Returns bytes (3, S, S): RGB first, so that alpha is dropped, and a margin's half rounded down.

    That is CLIPProcessor of transformers 4; its successor composites on white, and by default resizes without PIL.
    """
    return crop(shortest_to(image.convert("RGB"), size), size, lambda margin: margin // 2)


def openai(image: Image.Image, size: int) -> Tensor:
    """Returns bytes (3, S, S): resized with its alpha, RGB last, and a margin's half rounded to the even neighbour.

    That is the transform of openai's CLIP and of ImageReward, on torchvision.
    """
    return crop(shortest_to(image, size), size, lambda margin: round(margin / 2))


def shortest_to(image: Image.Image, size: int) -> Image.Image:
    """Resizes the short side to `size`, the long one to int(size * long / short), by PIL's bicubic filter."""
    width, height = image.size
    short, long = sorted((width, height))
    long = int(size * long / short)
    return image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: int, half: Callable[[int], int]) -> Tensor:
    """Cuts the centre (3, S, S) as bytes in RGB; half: of a margin, left and above."""
    left, top = half(image.width - size), half(image.height - size)
    return rgb_bytes(image.crop((left, top, left + size, top + size)))


def rgb_bytes(image: Image.Image) -> Tensor:
    """Returns the bytes (3, H, W) of an image as RGB."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def pixels(images: Sequence[Image.Image], size: int, to_bytes: ToBytes, mean_and_std: tuple) -> Tensor:
    """Returns normalised pixels (N, 3, S, S), float32 on the CPU; mean_and_std: three numbers each, for [0, 1]."""
    return normalised(torch.stack([to_bytes(image, size) for image in images]) / 255, mean_and_std)


def normalised(images: Tensor, mean_and_std: tuple) -> Tensor:
    """Normalises images (N, 3, H, W) in [0, 1] per channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_std)
    return (images - mean) / std
