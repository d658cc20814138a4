"""How far the pictures of a tuned model have drifted from those of its base: colour, light, detail, layout, diversity.

A judge that is pleased by something simple, such as saturated colours, moves these long before people would agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16  # pixels a side: what is where, without detail
MEANS = ("saturation", "brightness", "contrast", "detail")
# What is still like the base: means move by at most one standard deviation over the base's own prompts; the layout of a
# picture correlates with that from the same noise; the prompts' pictures differ from each other as much as before.
MOST_DEVIATIONS, LEAST_LAYOUT, LEAST_DIVERSITY = 1.0, 0.5, 0.7
DRIFT = (*MEANS, "layout", "diversity")


def statistics(images: Tensor) -> Tensor:
    """Returns (N, 4 + 3 * THUMBNAIL ** 2) numbers of images (N, 3, H, W) in [-1, 1]: MEANS, then a thumbnail.

    saturation: largest minus smallest channel, in [0, 2]; brightness: mean; contrast: standard deviation of the grey
    image; detail: root mean square of what a blur of 3 x 3 pixels removes.
    """
    grey = images.mean(1, keepdim=True)
    blurred = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    means = [
        (images.amax(1) - images.amin(1)).mean((1, 2)),
        grey.mean((1, 2, 3)),
        grey.std((1, 2, 3)),
        (grey - blurred).square().mean((1, 2, 3)).sqrt(),
    ]
    thumbnails = F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
    return torch.cat([torch.stack(means, 1), thumbnails], 1)


def drift(base: Tensor, tuned: Tensor) -> Tensor:
    """Returns the drift (6,) between statistics (N, ...) of pictures of the same N >= 2 prompts from the same noise.

    In the order of DRIFT: how far the four means moved, in standard deviations of the base over prompts; the mean
    correlation of the thumbnails, 1 if all is where it was; the mean distance of two thumbnails, over the base's.
    """
    count = len(MEANS)
    moved = (tuned - base)[:, :count].mean(0) / base[:, :count].std(0).clamp(min=1e-6)
    before, after = base[:, count:], tuned[:, count:]
    layout = F.cosine_similarity(before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)).mean()
    diversity = torch.pdist(after).mean() / torch.pdist(before).mean().clamp(min=1e-6)
    return torch.cat([moved, torch.stack([layout, diversity])])


def strayed(values: Tensor) -> list[str]:
    """Returns which entries of a drift (6,) are out of bounds."""
    *moved, layout, diversity = values.tolist()
    out = [name for name, value in zip(MEANS, moved, strict=True) if abs(value) > MOST_DEVIATIONS]
    return out + ["layout"] * (layout < LEAST_LAYOUT) + ["diversity"] * (diversity < LEAST_DIVERSITY)
