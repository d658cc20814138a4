"""Makes labelled pairs of images, as Pick-a-Pic has them, by a rule that weighs caption and quality.

P(first preferred) is a Bradley-Terry model of utility = ALIGNMENT * (follows caption) + QUALITY * q. Both images have
one caption and random qualities; in a third of the pairs at least one of them breaks the caption in one attribute;
a few pairs are ties. Images are stored as uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from strop.bench.tinyworld.render import to_float
from strop.bench.tinyworld.train_vae import render_uint8
from strop.bench.tinyworld.world import break_scene, caption, sample_quality, sample_scenes

QUALITY, ALIGNMENT = 6.0, 5.0  # utility of q from 0 to 1, and of following the caption
BROKEN, BOTH, TIES = 1 / 3, 0.1, 0.05  # share of pairs; of the broken ones, both images; share of ties


@dataclass(frozen=True, slots=True)
class PreferencePairs(Dataset):
    """n pairs: images_0, images_1 (n, 3, 64, 64) uint8; label_0 + label_1 = 1 (n,), 1, 0 or 0.5; broken (n, 2) bool;
    chance (n,), the true probability that image 0 wins (before ties)."""

    images_0: torch.Tensor
    images_1: torch.Tensor
    captions: list[str]
    label_0: torch.Tensor
    broken: torch.Tensor
    chance: torch.Tensor

    @property
    def label_1(self) -> torch.Tensor:
        return 1 - self.label_0

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | str | float]:
        """Returns a pair: image_0, image_1 (3, 64, 64) floats in [-1, 1], caption, label_0, label_1."""
        label = float(self.label_0[i])
        return {
            "image_0": to_float(self.images_0[i]),
            "image_1": to_float(self.images_1[i]),
            "caption": self.captions[i],
            "label_0": label,
            "label_1": 1 - label,
        }

    def bayes_accuracy(self, rows: torch.Tensor) -> float:
        """Returns the accuracy no judge can beat on average, over `rows` (n,) bool, ties left out."""
        rows = rows & (self.label_0 != 0.5)
        return torch.maximum(self.chance, 1 - self.chance)[rows].mean().item()


def preference_pairs(n: int, rng: torch.Generator) -> PreferencePairs:
    """Draws n labelled pairs."""
    scenes = sample_scenes(n, rng)
    broken = torch.zeros(n, 2, dtype=torch.bool)
    any_broken = torch.rand(n, generator=rng) < BROKEN
    both = torch.rand(n, generator=rng) < BOTH
    side = torch.rand(n, generator=rng) < 0.5
    broken[:, 0], broken[:, 1] = any_broken & (side | both), any_broken & (~side | both)
    shown = [
        [break_scene(scene, rng) if bad else scene for scene, bad in zip(scenes, column, strict=True)]
        for column in broken.T.tolist()
    ]
    q = torch.stack([sample_quality(n, rng), sample_quality(n, rng)])  # (2, n)
    images = [render_uint8(shown[i], q[i], rng) for i in (0, 1)]
    utility = QUALITY * q - ALIGNMENT * broken.T.float()
    chance = torch.sigmoid(utility[0] - utility[1])
    label = (torch.rand(n, generator=rng) < chance).float()
    label[torch.rand(n, generator=rng) < TIES] = 0.5
    return PreferencePairs(images[0], images[1], [caption(s) for s in scenes], label, broken, chance)


def load(seed: int, size: int) -> PreferencePairs:
    """Makes `size` pairs, as the factory that data.source names "strop.bench.tinyworld.pairs:load"."""
    return preference_pairs(size, torch.Generator().manual_seed(seed))
