"""Computes how the cost of a run scales with k, the inner steps, the resolution, and the number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..config.settings import accepts, keys, varied
from ..errors import UserError
from .communication import balance_bytes, zero_bytes
from .flops import stage_flops
from .gpus import Throughput
from .memory import memory_use
from .meta_models import ModelBuilder
from .row_counts import RowCounts, count_rows
from .unit_costs import Networks, UnitCosts, resized_costs

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """A recipe with another value of one key, or the recipe itself: operations done and rows to train on, per prompt or
    pair, and bytes at the peak."""

    value: str
    is_recipe: bool
    flops: float
    rows: float
    peak: float


@dataclass(frozen=True, slots=True)
class GpuRow:
    """A run on so many GPUs.

    zero, balance: bytes that each receives in an iteration; computing, receiving: seconds of an iteration;
    optimizer_steps and hours: of the whole run.
    """

    gpus: int
    zero: float
    balance: float
    computing: float
    receiving: float
    optimizer_steps: float
    hours: float


def along_k(builder: ModelBuilder, costs: UnitCosts, ranks: int) -> list[RecipeRow]:
    """Returns the rows of k = 2, 4, 8 and of the recipe's own k."""
    return _along(builder, "rollout.k", (2, 4, 8), costs, ranks)


def along_inner_steps(builder: ModelBuilder, costs: UnitCosts, ranks: int) -> list[RecipeRow]:
    """Returns the rows of segments of 1, 2, 4, 8 steps and of the recipe's own length."""
    return _along(builder, "rollout.inner_steps", (1, 2, 4, 8), costs, ranks)


def along_resolution(builder: ModelBuilder, networks: Networks, costs: UnitCosts, ranks: int) -> list[RecipeRow]:
    """Returns the rows of half, one and one and a half times the recipe's height and width, rounded to what the UNet
    can halve."""
    rows, multiple = [], builder.factor * builder.multiple
    for times in (0.5, 1, 1.5):
        height, width = (max(1, round(times * side / multiple)) * multiple for side in builder.size)
        sized = _varied(builder, {"model.height": height, "model.width": width})
        sized_costs = costs if times == 1 else resized_costs(sized, networks, costs)
        rows.append(_recipe_row(sized, f"{height}x{width}", times == 1, sized_costs, ranks))
    return rows


def along_gpus(
    builder: ModelBuilder,
    counts: RowCounts,
    costs: UnitCosts,
    throughput: Throughput,
    items: int,
    gpu_counts: Sequence[int] = GPU_COUNTS,
) -> list[GpuRow]:
    """Returns the rows of the same run on so many GPUs, each of which takes counts.items in an iteration.

    items: of the whole run, over all epochs.
    """
    config, rows = builder.config, []
    computing = throughput.seconds(stage_flops(builder, counts, costs).done * counts.items)
    for gpus in gpu_counts:
        iterations = math.ceil(items / (counts.items * gpus))
        zero = zero_bytes(config, counts, costs.weights.lora, gpus)
        balance = balance_bytes(counts, math.prod(builder.latent_shape), gpus)
        receiving = (zero + balance) / (throughput.gpu.link * 1e9)
        steps = iterations * counts.micro_batches / config.accumulate
        hours = iterations * (computing + receiving) / 3600
        rows.append(GpuRow(gpus, zero, balance, computing, receiving, steps, hours))
    return rows


def _along(builder: ModelBuilder, key: str, values: Sequence[int], costs: UnitCosts, ranks: int) -> list[RecipeRow]:
    """Returns the rows of some values of a key and of the recipe's own, but for those that its method refuses.

    Of a method without this key there are none.
    """
    if key not in keys(type(builder.config)):
        return []
    section, _, name = key.partition(".")
    own, rows = getattr(getattr(builder.config, section), name), []
    for value in sorted({*values, own}):
        if accepts(builder.config, {key: value}):
            with suppress(UserError):
                rows.append(_recipe_row(_varied(builder, {key: value}), str(value), value == own, costs, ranks))
    return rows


def _recipe_row(builder: ModelBuilder, value: str, is_recipe: bool, costs: UnitCosts, ranks: int) -> RecipeRow:
    counts = count_rows(builder.config, builder.schedule("cpu"))
    peak = memory_use(builder, counts, costs, ranks).peak
    flops = stage_flops(builder, counts, costs).done.all
    return RecipeRow(value, is_recipe, flops, counts.trained_rows / counts.items, peak)


def _varied(builder: ModelBuilder, values: dict) -> ModelBuilder:
    return replace(builder, config=varied(builder.config, values))
