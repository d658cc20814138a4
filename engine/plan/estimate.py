"""Estimates what a recipe costs before it runs.

A plan has operations by stage, per prompt, or per pair of a method that samples nothing, and beside a recipe with SPO's
rollout those of SPO's published code; memory by part, and keys to make it fit; hours and energy at a stated share of
the GPU's peak; and how all of it scales. Everything is counted on meta tensors, on any machine and without a download.
Hours are an estimate: nothing is timed here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from ..config.settings import keys, varied
from ..config.training import Config
from ..models.families.base import Family
from .fit import find_fixes
from .flops import StageFlops, evaluation_flops, published_flops, published_recipe, stage_flops
from .gpus import Gpu
from .memory import RESERVE, MemoryUse, memory_use
from .meta_models import ModelBuilder
from .row_counts import count_rows
from .scaling import along_gpus, along_key, along_resolution
from .unit_costs import Costs

CHECKPOINTING = "model.gradient_checkpointing"


class Plan:
    """All numbers that are printed of a recipe on so many GPUs of one kind.

    source: whose architecture is counted. items: prompts of the whole run, or pairs, as counts.item says. flops: of the
    recipe. published: of SPO's authors' code with its own rollout, None for a recipe without SPO's rollout;
    same_rollout: with this recipe's, None where they are the same. available: bytes of a GPU that tensors may take.
    fixes: keys that make it fit; fixed_memory: the memory with them; without_checkpointing: that without gradient
    checkpointing, None for a recipe that has none. hours: of the run, with the evaluation_hours of drawing the held-out
    prompts twice. kilowatt_hours: of all GPUs at their rated power. scaling: rows by what varies, none for keys that
    the recipe's method lacks; by_gpus: those of the same run on more GPUs.
    """

    def __init__(
        self, config: Config, recipe: str, gpu: Gpu, gpus: int, items: int | None = None, family: Family | None = None
    ):
        """Counts all of it. recipe: its name; items: of the whole run, None leaves them to run.iterations; family: of a
        model that is not on this machine.

        Raises UserError where model or method refuse the recipe.
        """
        self.recipe, self.gpu, self.gpus = recipe, gpu, gpus
        builder = ModelBuilder.of(config, family)
        schedule, forks = builder.schedule("cpu"), "rollout.k" in keys(type(config))  # as SPO's rollout
        counts, costs = count_rows(config, schedule), Costs(builder, published=forks)
        self.source, self.counts, self.flops = builder.source, counts, stage_flops(builder, counts, costs)
        self.published = published_flops(published_recipe(builder), costs) if forks else None
        same_rollout = published_flops(builder, costs) if forks else None
        self.same_rollout = same_rollout if same_rollout != self.published else None

        def memory(config: Config) -> MemoryUse:
            return memory_use(replace(builder, config=config), count_rows(config, schedule), costs, gpus)

        self.memory, self.available = memory(config), gpu.memory * 1e9 - RESERVE
        self.fits = self.memory.peak <= self.available
        self.fixes, self.fixed_memory = find_fixes(config, memory, self.available)
        checkpointing = config.model.gradient_checkpointing
        self.without_checkpointing = memory(varied(config, {CHECKPOINTING: False})) if checkpointing else None

        self.items = items or config.run.iterations * counts.items * gpus
        self.iterations = math.ceil(self.items / (counts.items * gpus))
        self.run, *self.by_gpus = along_gpus(builder, counts, costs, gpu, self.items, gpus)
        self.evaluation_hours = gpu.seconds(evaluation_flops(config, costs)) / gpus / 3600
        self.hours = self.run.hours + self.evaluation_hours
        self.gpu_hours = self.hours * gpus
        self.kilowatt_hours = self.gpu_hours * gpu.watts / 1000
        self.scaling = {
            "k": along_key(builder, "rollout.k", costs, gpus),
            "inner_steps": along_key(builder, "rollout.inner_steps", costs, gpus),
            "resolution": along_resolution(builder, costs, gpus),
        }

    def as_json(self) -> dict:
        """Returns all of it for JSON: operations, bytes, hours."""
        item, gpu = self.counts.item, asdict(self.gpu)
        share, source = gpu.pop("share"), gpu.pop("share_source")
        return {
            "recipe": self.recipe,
            "architecture": self.source,
            "gpu": gpu,
            "gpus": self.gpus,
            "share_of_peak": share,
            "share_from": source,
            "iterations": self.iterations,
            f"{item}s": self.items,
            f"flop_per_{item}": _operations(self.flops),
            f"flop_per_{item}_published": _operations(self.published),
            f"flop_per_{item}_published_same_rollout": _operations(self.same_rollout),
            "memory": asdict(self.memory) | {"peak": self.memory.peak},
            "fits": self.fits,
            "fixes": [asdict(fix) for fix in self.fixes],
            "memory_fixed": asdict(self.fixed_memory) | {"peak": self.fixed_memory.peak},
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "kwh": self.kilowatt_hours,
            "scaling": {name: [asdict(row) for row in rows] for name, rows in self.scaling.items()},
            "by_gpus": [asdict(row) for row in self.by_gpus],
        }


def _operations(flops: StageFlops | None) -> dict | None:
    if flops is None:
        return None
    stages = {name: stage.all for name, stage in flops.stages.items()}
    return {"stages": stages, "total": flops.needed.all, "done": flops.done.all, "plain": flops.plain}
