"""Says in one sentence where a run was out of memory, and which keys take less there: those that fit.py turns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from ..config.settings import accepts
from ..config.training import Config
from ..errors import UserError
from ..runtime.checkpoint import Recipe, last_checkpoint
from ..runtime.session import Session
from .fit import Settings, options

PHASES = {  # of fit.py, by the clock's stages
    "rollout": "rollout: UNet",
    "rollout/trunk": "rollout: UNet",
    "rollout/branches": "rollout: UNet",
    "rollout/decode": "rollout: decode",
    "rollout/audit": "rollout: decode",
    "encode": "encode",
    "evaluate": "evaluation",
    "update": "update",
}
ON_CPU = "can't allocate memory"


@contextmanager
def memory_errors_explained(session: Session) -> Iterator[None]:
    """Raises UserError in place of PyTorch's errors of a GPU, or a CPU, that is out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and ON_CPU not in str(error):
            raise
        stage, asked = session.clock.failed, re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        raise UserError(
            f"out of memory{f' in {stage}' if stage else ''}{f', asked for {asked[1]}' if asked else ''}: take less by "
            f"{', '.join(keys(session.config, stage))}, as `strop plan` says; {last_checkpoint(session.dir)}"
        ) from None


def keys(config: Recipe, stage: str) -> list[str]:
    """Returns the settings to turn where a stage needs too much memory, as key=value, the mildest first."""
    if not isinstance(config, Config):
        batch, accumulate = config.optim.batch, config.optim.accumulate
        smaller = {"optim.batch": max(1, batch // 2), "optim.accumulate": accumulate * 2}
        return [f"{key}={value}" for key, value in smaller.items()]
    mildest = next(chain(options(PHASES.get(stage, ""), config), _last_resorts(config)))
    return [f"{key}={str(value).lower()}" for key, value in mildest.items()]


def _last_resorts(config: Config) -> Iterator[Settings]:
    """Yields settings that take less memory in all stages, and change the numbers."""
    fewer = ({"rollout.prompts": prompts} for prompts in range(config.prompts_per_iteration // 2, 0, -1))
    yield from (settings for settings in fewer if accepts(config, settings))
    if config.model.dtype == "float32":
        yield {"model.dtype": "float16"}
    yield {"lora.rank": max(1, config.lora.rank // 2)}
