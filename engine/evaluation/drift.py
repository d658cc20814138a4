"""How far the pictures of a tuned model have drifted from those of its base.

Colour, light, background, detail, layout and diversity are looked at.
A judge that is pleased by something simple, such as saturated colours, moves these long before people would agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16  # pixels a side: what is where, without detail
BORDER = 2  # pixels of a thumbnail at each edge, which show background more than anything else
MEANS = ("saturation", "brightness", "contrast", "detail")
# What is still like the base: means move by at most one standard deviation over the base's own prompts; the layout of a
# picture correlates with that from the same noise; the prompts' pictures differ from each other as much as before.
MOST_DEVIATIONS, LEAST = 1.0, {"layout": 0.5, "diversity": 0.7}
DRIFT = (*MEANS, "background", "tint", *LEAST)


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
    """Returns the drift (8,) between statistics (N, ...) of pictures of the same N >= 2 prompts from the same noise.

    In the order of DRIFT: how far the four means moved, in standard deviations of the base over prompts; so for the
    brightness of the pictures' borders, and for the tint, a picture's mean colour without its brightness, in whatever
    direction it moved; the mean correlation of the thumbnails, 1 if all is where it was; the mean distance of two
    thumbnails, over the base's.
    """
    count = len(MEANS)
    before, after = base[:, count:], tuned[:, count:]
    means = [torch.column_stack([part[:, :count], _border(part[:, count:])]) for part in (base, tuned)]
    moved = (means[1] - means[0]).mean(0) / means[0].std(0).clamp(min=1e-6)
    tint = (_tint(after) - _tint(before)).mean(0).norm() / _tint(before).var(0).sum().sqrt().clamp(min=1e-6)
    layout = F.cosine_similarity(before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)).mean()
    diversity = torch.pdist(after).mean() / torch.pdist(before).mean().clamp(min=1e-6)
    return torch.cat([moved, torch.stack([tint, layout, diversity])])


def strayed(values: Mapping[str, float]) -> list[str]:
    """Returns which values of a drift, by the names in DRIFT, are out of bounds."""
    out = lambda name, value: value < LEAST[name] if name in LEAST else abs(value) > MOST_DEVIATIONS
    return [name for name, value in values.items() if out(name, value)]


def _border(thumbnails: Tensor) -> Tensor:
    """Returns the brightness (N,) of the borders of thumbnails (N, 3 * THUMBNAIL ** 2)."""
    at_border = torch.ones(THUMBNAIL, THUMBNAIL, dtype=torch.bool, device=thumbnails.device)
    at_border[BORDER:-BORDER, BORDER:-BORDER] = False
    return thumbnails.unflatten(1, (3, THUMBNAIL, THUMBNAIL))[..., at_border].mean((1, 2))


def _tint(thumbnails: Tensor) -> Tensor:
    """Returns the mean colours (N, 3) of thumbnails (N, 3 * THUMBNAIL ** 2) without their brightness."""
    colours = thumbnails.unflatten(1, (3, -1)).mean(2)
    return colours - colours.mean(1, keepdim=True)
