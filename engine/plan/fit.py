"""Finds keys that make a recipe fit into a GPU's memory, and that change its numbers by rounding at most.

Keys that change what is trained (k, prompts, the LoRA's rank, the resolution) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config.settings import accepts, varied
from ..config.training import Config
from ..errors import UserError
from .memory import MemoryUse

Settings = dict[str, int | bool | str]
Measure = Callable[[Config], MemoryUse]


@dataclass(frozen=True, slots=True)
class Fix:
    """Settings (values by dotted key) that make a phase smaller, from `before` bytes to `after`."""

    settings: Settings
    phase: str
    before: float
    after: float


def find_fixes(config: Config, measure: Measure, available: float) -> tuple[list[Fix], MemoryUse]:
    """Returns the fixes that make the recipe fit into `available` bytes, or almost, and the memory used with them."""
    memory, fixes = measure(config), []
    while memory.peak > available:
        fix = _best_fix(config, memory, measure, available)
        if fix is None:
            break
        fixes.append(fix)
        config = varied(config, fix.settings)
        memory = measure(config)
    # a fix whose keys a later one sets again is none
    overridden = lambda i: any(later.settings.keys() >= fixes[i].settings.keys() for later in fixes[i + 1 :])
    return [fix for i, fix in enumerate(fixes) if not overridden(i)], memory


def _best_fix(config: Config, memory: MemoryUse, measure: Measure, available: float) -> Fix | None:
    """Returns the mildest change that makes the largest phase fit; where none does, the one after which the phase is
    smallest, or None where nothing makes it smaller."""
    phase, before = memory.peak_phase, memory.peak
    best = None
    for settings in options(phase, config):
        try:
            after = measure(varied(config, settings)).phases[phase]
        except UserError:  # the method refuses them
            continue
        if after < (best.after if best else before):
            best = Fix(settings, phase, before, after)
        if best and best.after <= available:
            break
    return best


def options(phase: str, config: Config) -> Iterator[Settings]:
    """Yields settings that may make a phase smaller and that the recipe's method has, the mildest first."""
    model, optim, found = config.model, config.optim, []
    if phase == "rollout: UNet":
        found = [{"model.unet_rows": rows} for rows in (64, 32, 16, 8, 4, 2) if rows < (model.unet_rows or 65)]
    if phase == "rollout: decode":
        found = [{"model.decode_rows": rows} for rows in (16, 8, 4, 2, 1) if rows < (model.decode_rows or 17)]
    if phase == "evaluation":
        found = [{"evaluate.batch": batch} for batch in (32, 16, 8, 4, 2, 1) if batch < config.evaluate.batch]
    if phase == "update" and not model.gradient_checkpointing:
        found = [{"model.gradient_checkpointing": True}]
    elif phase in ("update", "encode"):
        for size in [size for size in range(optim.micro_batch - 1, 0, -1) if optim.micro_batch % size == 0]:
            accumulate = {"optim.accumulate": config.accumulate * optim.micro_batch // size}
            found.append({"optim.micro_batch": size} | (accumulate if hasattr(optim, "accumulate") else {}))
    if phase == "update" and config.zero.stage == 1:
        found.append({"zero.stage": 2})
    yield from (settings for settings in found if accepts(config, settings))
