"""Loads the examiners, which grade the images of a tuned model, and which no judge or trainer ever sees.

One CNN predicts the quality q of an image, another the attributes that the caption names. Weights and data are
independent of PickScore's; see train_examiners.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from strop.bench.tinyworld import models
from strop.bench.tinyworld.world import BACKGROUNDS, LAYOUTS, OBJECT_COLOURS, SHAPES, Scene, parse

WEIGHTS = Path(__file__).parent / "weights"
IGNORED = -100  # the class of an attribute that a caption does not name

HEADS = {
    "layout": LAYOUTS,
    "colour_a": OBJECT_COLOURS,
    "shape_a": SHAPES,
    "size": ("small", "large"),
    "colour_b": OBJECT_COLOURS,
    "shape_b": SHAPES,
    "background": BACKGROUNDS,
}


def attributes(scenes: list[Scene]) -> torch.Tensor:
    """Returns class indices (n, 7) in the order of HEADS, IGNORED where the caption does not name the attribute."""
    rows = []
    for scene in scenes:
        named = [(getattr(scene, head), options) for head, options in HEADS.items()]
        rows.append([options.index(value) if value else IGNORED for value, options in named])
    return torch.tensor(rows)


def head_sizes() -> dict[str, int]:
    return {name: len(options) for name, options in HEADS.items()}


def attributes_right(logits: dict[str, torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    """Returns whether each attribute is right or not named, (n, 7) bool."""
    predicted = torch.stack([logits[name].argmax(1) for name in HEADS], 1)
    return (predicted == wanted) | (wanted == IGNORED)


def load(device: str | torch.device, weights: Path = WEIGHTS) -> Callable[..., dict[str, torch.Tensor]]:
    """Returns examine(images (n, 3, 64, 64) in [-1, 1], prompts) -> {"quality": (n,) in [0, 1], "alignment": (n,)}.
    Alignment is 1.0 where every named attribute is right, else 0.0. examine raises ValueError on a prompt outside the
    world's grammar."""
    checker, regressor = models.checker(head_sizes(), 0), models.regressor(0)
    for model, name in ((checker, "checker"), (regressor, "regressor")):
        model.load_state_dict(load_file(weights / "examiners" / f"{name}.safetensors"))
        model.float().eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def examine(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        wanted = attributes([parse(prompt) for prompt in prompts]).to(device)
        images = images.to(device, torch.float32).clamp(-1, 1)
        quality, right = [], []
        for part, target in zip(images.split(128), wanted.split(128), strict=True):
            quality.append(regressor(part).clamp(0, 1))
            right.append(attributes_right(checker(part), target).all(1).float())
        return {"quality": torch.cat(quality), "alignment": torch.cat(right)}

    return examine
