"""What to turn when a recipe does not fit: keys that leave its numbers alone but for rounding, tried one after another.

Of keys that change what is trained (k, prompts, the LoRA's rank, the resolution) none is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config.settings import varied
from ..config.training import Config
from .memory import Footprint

Settings = dict[str, int | bool]
Weigh = Callable[[Config], Footprint]


@dataclass(frozen=True, slots=True)
class Mend:
    """settings: values by dotted key; before, after: bytes of the phase that they make smaller."""

    settings: Settings
    phase: str
    before: float
    after: float


def mends(config: Config, weigh: Weigh, room: float) -> tuple[list[Mend], Footprint]:
    """What makes the recipe fit into `room` bytes, as far as anything does, and what it takes then."""
    found, made = weigh(config), []
    while found.peak > room:
        mend = _mend(config, found, weigh, room)
        if mend is None:
            break
        made.append(mend)
        config = varied(config, mend.settings)
        found = weigh(config)
    return _last_of_each(made), found


def _mend(config: Config, found: Footprint, weigh: Weigh, room: float) -> Mend | None:
    """The least change that makes the largest phase fit, or the one after which it is smallest; None where none does
    anything."""
    phase, before = found.peak_phase, found.peak
    best = None
    for settings in _options(phase, config):
        after = weigh(varied(config, settings)).phases[phase]
        if after < (best.after if best else before):
            best = Mend(settings, phase, before, after)
        if best and best.after <= room:
            break
    return best


def _options(phase: str, config: Config) -> Iterator[Settings]:
    """Settings that may make a phase smaller, the mildest first."""
    model, optim = config.model, config.optim
    if phase == "rollout: UNet":
        yield from ({"model.unet_rows": rows} for rows in (64, 32, 16, 8, 4, 2) if rows < (model.unet_rows or 65))
    if phase == "rollout: decode":
        yield from ({"model.decode_rows": rows} for rows in (16, 8, 4, 2, 1) if rows < (model.decode_rows or 17))
    if phase == "evaluation":
        yield from ({"evaluate.batch": batch} for batch in (32, 16, 8, 4, 2, 1) if batch < config.evaluate.batch)
    if phase == "update" and not model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    elif phase == "update":
        smaller = [size for size in range(optim.micro_batch - 1, 0, -1) if optim.micro_batch % size == 0]
        for size in smaller:
            yield {"optim.micro_batch": size, "optim.accumulate": optim.accumulate * optim.micro_batch // size}
    if phase == "update" and config.zero.stage == 1:
        yield {"zero.stage": 2}


def _last_of_each(made: list[Mend]) -> list[Mend]:
    """Without those that a later one overrides."""
    overridden = lambda i: any(later.settings.keys() >= made[i].settings.keys() for later in made[i + 1 :])
    return [mend for i, mend in enumerate(made) if not overridden(i)]
