"""Estimates what a recipe costs before it runs.

A plan has operations by stage, per prompt, or per pair of a method that samples nothing, and beside a recipe with SPO's
rollout those of SPO's published code; memory by part, and keys to make it fit; hours and energy at a stated share of
the GPU's peak; and how all of it scales. Everything is counted on meta tensors, on any machine and without a download.
Hours are an estimate: nothing is timed here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.settings import keys, varied
from ..config.training import Config
from ..models.families.base import Family
from .fit import Fix, find_fixes
from .flops import StageFlops, evaluation_flops, published_flops, published_recipe, stage_flops
from .gpus import ASSUMED_SHARE, Gpu, find_gpu, measured_share
from .memory import RESERVE, MemoryUse, memory_use
from .meta_models import ModelBuilder
from .row_counts import RowCounts, count_rows
from .scaling import GpuRow, RecipeRow, along_gpus, along_key, along_resolution
from .unit_costs import Costs

CHECKPOINTING = "model.gradient_checkpointing"
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Plan:
    """All numbers that are printed.

    gpu: with the share of its peak that it reaches; share_source: where that number comes from. items: prompts of the
    whole run, or pairs, as counts.item says. published: SPO's authors' code with its own rollout, None for a recipe
    without SPO's rollout; published_same_rollout: with this recipe's, None where they are the same. fixes: keys that
    make it fit; fixed_memory: the memory with them. memory_without_checkpointing: None for a recipe without gradient
    checkpointing. evaluation_hours: of drawing the held-out prompts twice. scaling: rows by what varies, none for keys
    that the recipe's method lacks.
    """

    recipe: str
    source: str
    gpu: Gpu
    gpus: int
    share_source: str
    iterations: int
    items: int
    counts: RowCounts
    flops: StageFlops
    published: StageFlops | None
    published_same_rollout: StageFlops | None
    memory: MemoryUse
    fixes: list[Fix]
    fixed_memory: MemoryUse
    memory_without_checkpointing: MemoryUse | None
    run: GpuRow
    evaluation_hours: float
    scaling: dict[str, list[RecipeRow]]
    by_gpus: list[GpuRow]

    @property
    def available(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.gpu.memory * 1e9 - RESERVE

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    @property
    def hours(self) -> float:
        return self.run.hours + self.evaluation_hours

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    @property
    def kilowatt_hours(self) -> float:
        """Energy of all GPUs at their rated power for all of the time."""
        return self.gpu_hours * self.gpu.watts / 1000


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of the command line beside the recipe and its GPUs; None leaves them to the plan.

    items: prompts, or pairs, of the whole run; share: of the GPU's peak; family: of a model that is not here.
    """

    items: int | None = None
    share: float | None = None
    family: Family | None = None


def make_plan(config: Config, recipe: str, gpu_key: str, gpus: int, options: PlanOptions = PlanOptions()) -> Plan:
    """Returns the plan of a recipe on so many GPUs of one kind. recipe: its name; gpu_key: a key of gpus.GPUS.

    Raises UserError for an unknown GPU, and where model or method refuse the recipe.
    """
    share, share_source = _share(options.share, gpu_key, recipe)
    gpu, builder = replace(find_gpu(gpu_key), share=share), ModelBuilder.of(config, options.family)
    schedule = builder.schedule("cpu")
    counts = count_rows(config, schedule)
    forks = "rollout.k" in keys(type(config))  # as in SPO
    costs = Costs(builder, published=forks)
    items = options.items or config.run.iterations * counts.items * gpus
    published = published_flops(published_recipe(builder), costs) if forks else None
    same_rollout = published_flops(builder, costs) if forks else None

    def measure(changed: Config) -> MemoryUse:
        return memory_use(replace(builder, config=changed), count_rows(changed, schedule), costs, gpus)

    fixes, fixed_memory = find_fixes(config, measure, gpu.memory * 1e9 - RESERVE)
    checkpointing = config.model.gradient_checkpointing
    return Plan(
        recipe=recipe,
        source=builder.source,
        gpu=gpu,
        gpus=gpus,
        share_source=share_source,
        iterations=math.ceil(items / (counts.items * gpus)),
        items=items,
        counts=counts,
        flops=stage_flops(builder, counts, costs),
        published=published,
        published_same_rollout=same_rollout if same_rollout != published else None,
        memory=measure(config),
        fixes=fixes,
        fixed_memory=fixed_memory,
        memory_without_checkpointing=measure(varied(config, {CHECKPOINTING: False})) if checkpointing else None,
        run=along_gpus(builder, counts, costs, gpu, items, [gpus])[0],
        evaluation_hours=gpu.seconds(evaluation_flops(config, costs)) / gpus / 3600,
        scaling={
            "k": along_key(builder, "rollout.k", costs, gpus),
            "inner_steps": along_key(builder, "rollout.inner_steps", costs, gpus),
            "resolution": along_resolution(builder, costs, gpus),
        },
        by_gpus=along_gpus(builder, counts, costs, gpu, items),
    )


def _share(asked: float | None, gpu_key: str, recipe: str) -> tuple[float, str]:
    """Returns (share of the GPU's peak, where it comes from)."""
    if asked is not None:
        return asked, "given"
    if measured := measured_share(RESULTS, gpu_key, recipe):
        return measured[0], f"measured, {measured[1].name}"
    return ASSUMED_SHARE, "assumed: no measurement of this GPU in bench/results"


def as_json(plan: Plan) -> dict:
    """Returns everything in a plan for JSON: operations, bytes, hours."""
    item, same_rollout = plan.counts.item, plan.published_same_rollout
    operations = lambda flops: (
        flops
        and {
            "stages": {name: stage.all for name, stage in flops.stages.items()},
            "total": flops.needed.all,
            "done": flops.done.all,
            "plain": flops.plain,
        }
    )
    return {
        "recipe": plan.recipe,
        "architecture": plan.source,
        "gpu": asdict(plan.gpu),
        "gpus": plan.gpus,
        "share_of_peak": plan.gpu.share,
        "share_from": plan.share_source,
        "iterations": plan.iterations,
        f"{item}s": plan.items,
        f"flop_per_{item}": operations(plan.flops),
        f"flop_per_{item}_published": operations(plan.published),
        f"flop_per_{item}_published_same_rollout": operations(same_rollout),
        "memory": asdict(plan.memory) | {"peak": plan.memory.peak},
        "fits": plan.fits,
        "fixes": [asdict(fix) for fix in plan.fixes],
        "memory_fixed": asdict(plan.fixed_memory) | {"peak": plan.fixed_memory.peak},
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "kwh": plan.kilowatt_hours,
        "scaling": {name: [asdict(row) for row in rows] for name, rows in plan.scaling.items()},
        "by_gpus": [asdict(row) for row in plan.by_gpus],
    }
