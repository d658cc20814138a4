"""Estimates what a recipe costs before it runs.

A plan has operations per prompt by stage, of strop and of the published code; memory by part, and keys to make it fit;
hours and energy at a stated share of the GPU's peak; and how all of it scales. Everything is counted on meta tensors,
in half a minute, on any machine and without a download. Hours are an estimate: nothing is timed here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.methods.spo import SPOConfig
from ..config.settings import varied
from ..methods.spo.rollout import check_steps
from ..models.families.base import Family
from .fit import Fix, find_fixes
from .flops import StageFlops, evaluation_flops, published_flops, published_recipe, stage_flops
from .gpus import ASSUMED_SHARE, Gpu, Throughput, find_gpu, measured_share
from .memory import RESERVE, MemoryUse, memory_use
from .meta_models import ModelBuilder
from .row_counts import RowCounts, count_rows
from .scaling import GpuRow, RecipeRow, along_gpus, along_inner_steps, along_k, along_resolution
from .unit_costs import Networks, unit_costs

CHECKPOINTING = "model.gradient_checkpointing"
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Plan:
    """All numbers that are printed.

    share: of the GPU's peak; share_source: where that number comes from. published: the authors' code with its own
    rollout; published_same_rollout: with this recipe's, None where they are the same. fixes: keys that make it fit;
    fixed_memory: the memory with them. memory_without_checkpointing: None for a recipe without gradient
    checkpointing. evaluation_hours: of drawing the held-out prompts twice. k, inner_steps, resolution, by_gpus: rows of
    scaling.py.
    """

    recipe: str
    source: str
    gpu: Gpu
    gpus: int
    share: float
    share_source: str
    iterations: int
    prompts: int
    counts: RowCounts
    flops: StageFlops
    published: StageFlops
    published_same_rollout: StageFlops | None
    memory: MemoryUse
    fixes: list[Fix]
    fixed_memory: MemoryUse
    memory_without_checkpointing: MemoryUse | None
    run: GpuRow
    evaluation_hours: float
    k: list[RecipeRow]
    inner_steps: list[RecipeRow]
    resolution: list[RecipeRow]
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

    prompts: of the whole run; share: of the GPU's peak; family: of a model that is not on this machine.
    """

    prompts: int | None = None
    share: float | None = None
    family: Family | None = None


def make_plan(config: SPOConfig, recipe: str, gpu_key: str, gpus: int, options: PlanOptions = PlanOptions()) -> Plan:
    """Returns the plan of a recipe on so many GPUs of one kind. recipe: its name; gpu_key: a key of gpus.GPUS.

    Raises UserError for an unknown GPU, and where the recipe's model or steps are none that strop trains.
    """
    gpu, builder = find_gpu(gpu_key), ModelBuilder.of(config, options.family)
    schedule = builder.schedule("cpu")
    check_steps(config.rollout, schedule)
    networks = Networks.of(builder)
    counts, costs = count_rows(config, schedule), unit_costs(builder, networks)
    share, share_source = _share(options.share, gpu_key, recipe)
    throughput = Throughput(gpu, share)
    prompts = options.prompts or config.run.iterations * config.rollout.prompts * gpus
    published, same_rollout = (published_flops(recipe, costs) for recipe in (published_recipe(builder), builder))

    def measure(changed: SPOConfig) -> MemoryUse:
        return memory_use(replace(builder, config=changed), count_rows(changed, schedule), costs, gpus)

    fixes, fixed_memory = find_fixes(config, measure, gpu.memory * 1e9 - RESERVE)
    checkpointing = config.model.gradient_checkpointing
    return Plan(
        recipe=recipe,
        source=builder.source,
        gpu=gpu,
        gpus=gpus,
        share=share,
        share_source=share_source,
        iterations=math.ceil(prompts / (counts.prompts * gpus)),
        prompts=prompts,
        counts=counts,
        flops=stage_flops(builder, counts, costs),
        published=published,
        published_same_rollout=same_rollout if same_rollout != published else None,
        memory=measure(config),
        fixes=fixes,
        fixed_memory=fixed_memory,
        memory_without_checkpointing=measure(varied(config, {CHECKPOINTING: False})) if checkpointing else None,
        run=along_gpus(builder, counts, costs, throughput, prompts, [gpus])[0],
        evaluation_hours=throughput.seconds(evaluation_flops(config, costs)) / gpus / 3600,
        k=along_k(builder, costs, gpus),
        inner_steps=along_inner_steps(builder, costs, gpus),
        resolution=along_resolution(builder, networks, costs, gpus),
        by_gpus=along_gpus(builder, counts, costs, throughput, prompts),
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
    by_stage = lambda flops: {name: stage.all for name, stage in flops.stages.items()}
    operations = lambda flops: {
        "stages": by_stage(flops),
        "total": flops.needed.all,
        "done": flops.done.all,
        "plain": flops.plain,
    }
    bytes_of = lambda memory: {"parts": memory.parts, "phases": memory.phases, "peak": memory.peak}
    same_rollout = plan.published_same_rollout
    return {
        "recipe": plan.recipe,
        "architecture": plan.source,
        "gpu": asdict(plan.gpu),
        "gpus": plan.gpus,
        "share_of_peak": plan.share,
        "share_from": plan.share_source,
        "iterations": plan.iterations,
        "prompts": plan.prompts,
        "flop_per_prompt": operations(plan.flops),
        "flop_per_prompt_published": operations(plan.published),
        "flop_per_prompt_published_same_rollout": operations(same_rollout) if same_rollout else None,
        "memory": bytes_of(plan.memory),
        "fits": plan.fits,
        "fixes": [asdict(fix) for fix in plan.fixes],
        "memory_fixed": bytes_of(plan.fixed_memory),
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "kwh": plan.kilowatt_hours,
        "scaling": {name: [asdict(row) for row in getattr(plan, name)] for name in ("k", "inner_steps", "resolution")},
        "by_gpus": [asdict(row) for row in plan.by_gpus],
    }
