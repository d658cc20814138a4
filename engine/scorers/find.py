"""Finds a scorer by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from ..config.factory import resolve
from ..errors import UserError, one_line
from . import aesthetic, clip_score, hpsv2, image_reward, pickscore
from .scorer import DEFAULTS, Options, Scorer

LOADERS = {
    "pickscore": pickscore.load,
    "hpsv2": partial(hpsv2.load, "hpsv2"),
    "hpsv2.1": partial(hpsv2.load, "hpsv2.1"),
    "image_reward": image_reward.load,
    "aesthetic": aesthetic.load,
    "clip_score": clip_score.load,
}


def load_scorer(
    spec: str, key: str, device: torch.device, batch: int = DEFAULTS.batch
) -> Callable[..., dict[str, Tensor]]:
    """Loads the scorer that a recipe names, such as "pickscore", "hpsv2=HPS_v2_compressed.pt" or "module:factory".

    key: the configuration key of `spec`, for the message; batch: images of a forward, of scorers that come with strop.
    Raises UserError as `load` and config/factory.py do.
    """
    name, _, weights = spec.partition("=")
    if is_factory(spec):
        return resolve(spec, key)(device)
    try:
        return load(name, weights or None, options=Options(device, batch=batch))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def is_factory(spec: str) -> bool:
    """Whether a scorer's spec names code, and not a scorer of LOADERS with its weights."""
    return ":" in spec and spec.partition("=")[0] not in LOADERS


def scores_by(
    scorer: Callable[..., dict[str, Tensor]],
    images: Tensor | Sequence[Image.Image],
    prompts: Sequence[str],
    spec: str,
    key: str,
) -> dict[str, list[float]]:
    """Returns a scorer's scores by their names, one for each of N images and prompts.

    Raises UserError, with the key of the scorer's spec, unless there are N finite numbers under each name.
    """
    try:
        values = {name: column.float().tolist() for name, column in scorer(images, prompts).items()}
    except ValueError as error:
        raise UserError(f"{key}: {spec} cannot score {prompts[0]!r} and what is with it ({one_line(error)})") from None
    for name, column in values.items():
        bad = [i for i, value in enumerate(column) if not math.isfinite(value)]
        if len(column) != len(prompts) or bad:
            found = f"{column[bad[0]]} for {prompts[bad[0]]!r}" if bad else f"{len(column)} scores"
            raise UserError(f"{key}: {spec} gave {found} as {name}, expected {len(prompts)} finite numbers")
    return values


def load(name: str, weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> Scorer:
    """Loads the scorer of a name of LOADERS.

    weights: a file, a folder or a hub id, owner/name or owner/name/file; None is what its authors published.
    components: folder or hub id of what the weights lack (a tokenizer, for the aesthetic head its CLIP); None is what
    the authors use. Raises UserError for another name, and for files that are missing or unfit.
    """
    if name not in LOADERS:
        raise UserError(f"found no scorer {name!r}, expected one of {', '.join(LOADERS)}")
    return LOADERS[name](weights, components, options)
