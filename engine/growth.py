"""How a run's cost grows: with k, with the inner steps, with the resolution, and with the GPUs that share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from strop.engine.blueprint import Blueprint
from strop.engine.cards import Card
from strop.engine.cost import Cost, cost
from strop.engine.footprint import footprint
from strop.engine.prices import Networks, Prices, resized
from strop.engine.settings import varied
from strop.engine.tally import Tally, tally
from strop.engine.traffic import balance_bytes, zero_bytes

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
    """A run shared by so many GPUs: bytes that each receives in an iteration, seconds of computing and of receiving in
    it, optimizer steps and hours of the whole run."""

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
    blueprint: Blueprint, counted: Tally, price: Prices, card: Card, share: float, total: int
) -> list[Share]:
    """The same prompts in all, shared by 1 to 64 GPUs, each of which has rollout.prompts of them in an iteration."""
    each = cost(blueprint, counted, price)
    return [gpu_share(blueprint, counted, price, each, card, share, total, gpus) for gpus in GPUS]


def gpu_share(
    blueprint: Blueprint, counted: Tally, price: Prices, each: Cost, card: Card, share: float, total: int, gpus: int
) -> Share:
    """What one of so many GPUs does; total: prompts of the run, over all of them and all its epochs."""
    config = blueprint.config
    iterations = math.ceil(total / (counted.prompts * gpus))
    zero = zero_bytes(config, counted, price.weights.lora, gpus)
    pairs = balance_bytes(counted, math.prod(blueprint.latent_shape), gpus)
    computing = card.seconds(each.done * counted.prompts, share)
    receiving = (zero + pairs) / (card.link * 1e9)
    steps = iterations * counted.micro_batches / config.optim.accumulate
    return Share(gpus, zero, pairs, computing, receiving, steps, iterations * (computing + receiving) / 3600)


def _step(blueprint: Blueprint, values: dict, label: object, own: bool, price: Prices, ranks: int) -> Step:
    changed = _varied(blueprint, values)
    counted = tally(changed.config, changed.schedule("cpu"))
    peak = footprint(changed, counted, price, ranks).peak
    flops = cost(changed, counted, price).done.all
    return Step(str(label), own, flops, counted.pairs / counted.prompts, peak)


def _varied(blueprint: Blueprint, values: dict) -> Blueprint:
    return replace(blueprint, config=varied(blueprint.config, values))
