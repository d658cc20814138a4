"""Computes how the cost of a run scales with k, the inner steps, the resolution, and the number of GPUs.

The bytes that processes receive from each other hold for exchanges that go round in a ring, as NCCL's do: in an
all-gather a process receives the rows of the others, in an all-reduce twice that. Scalars are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from ..config.settings import accepts, keys, varied
from ..config.training import Config
from ..errors import UserError
from .flops import stage_flops
from .gpus import Gpu
from .memory import memory_use
from .meta_models import ModelBuilder
from .row_counts import RowCounts, count_rows
from .unit_costs import Costs

VALUES = {"rollout.k": (2, 4, 8), "rollout.inner_steps": (1, 2, 4, 8)}
SIZES = 0.5, 1, 1.5  # times the recipe's height and width
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


def along_key(builder: ModelBuilder, key: str, costs: Costs, ranks: int) -> list[RecipeRow]:
    """Returns the rows of VALUES of a key and of the recipe's own value, but for those that its method refuses.

    Of a method without this key there are none.
    """
    if key not in keys(type(builder.config)):
        return []
    section, _, name = key.partition(".")
    own, rows = getattr(getattr(builder.config, section), name), []
    for value in sorted({*VALUES[key], own}):
        if accepts(builder.config, {key: value}):
            with suppress(UserError):
                rows.append(_recipe_row(_varied(builder, {key: value}), str(value), value == own, costs, ranks))
    return rows


def along_resolution(builder: ModelBuilder, costs: Costs, ranks: int) -> list[RecipeRow]:
    """Returns the rows of SIZES, rounded to what the UNet can halve."""
    rows, multiple = [], builder.factor * builder.multiple
    for times in SIZES:
        height, width = (max(1, round(times * side / multiple)) * multiple for side in builder.size)
        sized = _varied(builder, {"model.height": height, "model.width": width})
        rows.append(_recipe_row(sized, f"{height}x{width}", times == 1, costs.at(sized), ranks))
    return rows


def along_gpus(builder: ModelBuilder, counts: RowCounts, costs: Costs, gpu: Gpu, items: int, gpus: int) -> list[GpuRow]:
    """Returns the row of a run on `gpus` GPUs, then those of the same run on GPU_COUNTS.

    Each GPU takes counts.items in an iteration. items: of the whole run, over all epochs.
    """
    config, rows = builder.config, []
    computing = gpu.seconds(stage_flops(builder, counts, costs).done * counts.items)
    for ranks in (gpus, *GPU_COUNTS):
        iterations = math.ceil(items / (counts.items * ranks))
        zero = zero_bytes(config, counts, costs.weights["LoRA"], ranks)
        balance = balance_bytes(counts, math.prod(builder.latent_shape), ranks)
        receiving = (zero + balance) / (gpu.link * 1e9)
        steps = iterations * counts.micro_batches / config.accumulate
        hours = iterations * (computing + receiving) / 3600
        rows.append(GpuRow(ranks, zero, balance, computing, receiving, steps, hours))
    return rows


def zero_bytes(config: Config, counts: RowCounts, lora: float, ranks: int) -> float:
    """Returns the bytes that ZeRO sends to one process in an iteration, where `lora` bytes are trained.

    Gradients are all-reduced at every optimizer step, and the parameters gathered after it.
    """
    return (ranks - 1) / ranks * lora * 3 * counts.micro_batches / config.accumulate


def balance_bytes(counts: RowCounts, latent: int, ranks: int) -> float:
    """Returns the bytes that a process receives when `balance` gathers all pairs; every process makes as many.

    latent: numbers of a latent. They are 0 where each rank learns from what it collected itself.
    """
    return (ranks - 1) * counts.collected_bytes(latent) if counts.exchanged else 0


def _recipe_row(builder: ModelBuilder, value: str, is_recipe: bool, costs: Costs, ranks: int) -> RecipeRow:
    counts = count_rows(builder.config, builder.schedule("cpu"))
    peak = memory_use(builder, counts, costs, ranks).peak
    flops = stage_flops(builder, counts, costs).done.all
    return RecipeRow(value, is_recipe, flops, counts.trained_rows / counts.items, peak)


def _varied(builder: ModelBuilder, values: Mapping) -> ModelBuilder:
    return replace(builder, config=varied(builder.config, values))
