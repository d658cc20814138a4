"""Finds a scorer by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..config.factory import resolve
from ..errors import UserError
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


def load_scorer(spec: str, key: str, device: torch.device) -> Callable[..., dict[str, Tensor]]:
    """Loads the scorer that a recipe names, such as "pickscore", "hpsv2=HPS_v2_compressed.pt" or "module:factory".

    key: the configuration key of `spec`, for the message. Raises UserError as `load` and config/factory.py do.
    """
    name, _, weights = spec.partition("=")
    if name not in LOADERS and ":" in spec:
        return resolve(spec, key)(device)
    try:
        return load(name, weights or None, options=Options(device))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def load(name: str, weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> Scorer:
    """Loads the scorer of a name of LOADERS.

    weights: a file, a folder or a hub id, owner/name or owner/name/file; None is what its authors published.
    components: folder or hub id of what the weights lack (a tokenizer, for the aesthetic head its CLIP); None is what
    the authors use. Raises UserError for another name, and for files that are missing or unfit.
    """
    if name not in LOADERS:
        raise UserError(f"found no scorer {name!r}, expected one of {', '.join(LOADERS)}")
    return LOADERS[name](weights, components, options)
