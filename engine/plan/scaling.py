"""How a run's cost grows: with k, with the inner steps, with the resolution, and with the GPUs that share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config.settings import varied
from .communication import balance_bytes, zero_bytes
from .flops import cost
from .gpus import Pace
from .memory import footprint
from .meta_models import Blueprint
from .row_counts import Tally, tally
from .unit_costs import Networks, Prices, resized

GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Step:
    """A recipe with another value of one key: operations done per prompt, pairs per prompt, bytes at the peak."""

    value: str
    own: bool
    flops: float
    pairs: float
    peak: float


@dataclass(frozen=True, slots=True)
class Share:
    """A run shared by so many GPUs.

    zero, balance: bytes that each receives in an iteration; computing, receiving: seconds of it; optimizer_steps and
    hours: of the whole run.
    """

    gpus: int
    zero: float
    balance: float
    computing: float
    receiving: float
    optimizer_steps: float
    hours: float


def along_k(blueprint: Blueprint, price: Prices, ranks: int) -> list[Step]:
    """k = 2, 4, 8 and the recipe's own."""
    own = blueprint.config.rollout.k
    return [_step(blueprint, {"rollout.k": k}, k, k == own, price, ranks) for k in sorted({2, 4, 8, own})]


def along_inner_steps(blueprint: Blueprint, price: Prices, ranks: int) -> list[Step]:
    """Segments of 1, 2, 4, 8 steps and the recipe's own."""
    own = blueprint.config.rollout.inner_steps
    values = sorted({1, 2, 4, 8, own})
    return [_step(blueprint, {"rollout.inner_steps": n}, n, n == own, price, ranks) for n in values]


def along_resolution(blueprint: Blueprint, networks: Networks, price: Prices, ranks: int) -> list[Step]:
    """Half, one and one and a half times the recipe's height and width, as the UNet takes them."""
    blocks, made = len(blueprint.parts["unet"].get("block_out_channels", range(4))), []
    multiple = blueprint.factor * 2 ** (blocks - 1)
    for times in (0.5, 1, 1.5):
        height, width = (max(1, round(times * side / multiple)) * multiple for side in blueprint.size)
        sized = _varied(blueprint, {"model.height": height, "model.width": width})
        sized_price = price if times == 1 else resized(sized, networks, price)
        made.append(_step(sized, {}, f"{height}x{width}", times == 1, sized_price, ranks))
    return made


def along_gpus(
    blueprint: Blueprint, counted: Tally, price: Prices, pace: Pace, total: int, gpus: Sequence[int] = GPUS
) -> list[Share]:
    """The same prompts shared by so many GPUs, each of which has rollout.prompts of them in an iteration.

    total: prompts of the run, over all epochs.
    """
    config, made = blueprint.config, []
    computing = pace.seconds(cost(blueprint, counted, price).done * counted.prompts)
    for count in gpus:
        iterations = math.ceil(total / (counted.prompts * count))
        zero = zero_bytes(config, counted, price.weights.lora, count)
        balance = balance_bytes(counted, math.prod(blueprint.latent_shape), count)
        receiving = (zero + balance) / (pace.card.link * 1e9)
        steps = iterations * counted.micro_batches / config.optim.accumulate
        hours = iterations * (computing + receiving) / 3600
        made.append(Share(count, zero, balance, computing, receiving, steps, hours))
    return made


def _step(blueprint: Blueprint, values: dict, label: object, own: bool, price: Prices, ranks: int) -> Step:
    changed = _varied(blueprint, values)
    counted = tally(changed.config, changed.schedule("cpu"))
    peak = footprint(changed, counted, price, ranks).peak
    flops = cost(changed, counted, price).done.all
    return Step(str(label), own, flops, counted.pairs / counted.prompts, peak)


def _varied(blueprint: Blueprint, values: dict) -> Blueprint:
    return replace(blueprint, config=varied(blueprint.config, values))
