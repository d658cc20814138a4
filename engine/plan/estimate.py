"""What a recipe costs before it runs.

Operations per prompt by stage, of strop and of the published code; memory by part, and what to turn where it does not
fit; hours and energy at a stated share of the GPU's peak; how all of it grows. Everything is counted on meta tensors,
in less than a minute, on any machine and without a download. Seconds are an estimate: nothing is timed here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..config.settings import varied
from ..config.training import Config
from ..methods.spo.rollout import check_steps
from ..models.families.base import Family
from .fit import Mend, mends
from .flops import Cost, cost, evaluation, published_cost, published_recipe
from .gpus import ASSUMED, Card, Pace, card, measured_share
from .memory import RESERVE, Footprint, footprint
from .meta_models import Blueprint
from .row_counts import Tally, tally
from .scaling import Share, Step, along_gpus, along_inner_steps, along_k, along_resolution
from .unit_costs import Networks, prices

CHECKPOINTING = "model.gradient_checkpointing"
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is printed.

    published: what the authors' code does; alike: that code with this recipe's rollout, None where they are the same.
    fixes: what makes it fit, after which it takes `fixed`. unchecked: what it takes without gradient checkpointing,
    None where it has none. evaluation_hours: of drawing the held-out prompts, twice.
    """

    recipe: str
    source: str
    card: Card
    gpus: int
    share: float
    share_from: str
    iterations: int
    prompts: int
    counted: Tally
    cost: Cost
    published: Cost
    alike: Cost | None
    memory: Footprint
    fixes: list[Mend]
    fixed: Footprint
    unchecked: Footprint | None
    run: Share
    evaluation_hours: float
    k: list[Step]
    inner_steps: list[Step]
    resolution: list[Step]
    sharing: list[Share]

    @property
    def room(self) -> float:
        """Bytes of the card that tensors may take."""
        return self.card.memory * 1e9 - RESERVE

    @property
    def hours(self) -> float:
        return self.run.hours + self.evaluation_hours

    @property
    def kilowatt_hours(self) -> float:
        """All GPUs at their rated power all the time."""
        return self.hours * self.gpus * self.card.watts / 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a plan may be asked beside its recipe and its GPUs, as on the command line; None leaves it to the plan.

    prompts: of the whole run; share: of the GPU's peak; family: of a model that is not on this machine.
    """

    prompts: int | None = None
    share: float | None = None
    family: Family | None = None


def make(config: Config, recipe: str, gpu: str, gpus: int, wanted: Wanted = Wanted()) -> Plan:
    """The plan of a recipe of this name on so many GPUs of a kind.

    Raises UserError for an unknown GPU, and where the recipe's model or steps are none that strop trains.
    """
    device, blueprint = card(gpu), Blueprint.of(config, wanted.family)
    schedule = blueprint.schedule("cpu")
    check_steps(config.rollout, schedule)
    networks = Networks.of(blueprint)
    counted, price = tally(config, schedule), prices(blueprint, networks)
    share, share_from = _share(wanted.share, gpu, recipe)
    pace = Pace(device, share)
    total = wanted.prompts or config.run.iterations * config.rollout.prompts * gpus
    published, alike = (published_cost(each, price) for each in (published_recipe(blueprint), blueprint))

    def weigh(changed: Config) -> Footprint:
        other = replace(blueprint, config=changed)
        return footprint(other, tally(changed, schedule), price, gpus)

    fixes, fixed = mends(config, weigh, device.memory * 1e9 - RESERVE)
    return Plan(
        recipe=recipe,
        source=blueprint.source,
        card=device,
        gpus=gpus,
        share=share,
        share_from=share_from,
        iterations=math.ceil(total / (counted.prompts * gpus)),
        prompts=total,
        counted=counted,
        cost=cost(blueprint, counted, price),
        published=published,
        alike=alike if alike != published else None,
        memory=weigh(config),
        fixes=fixes,
        fixed=fixed,
        unchecked=weigh(varied(config, {CHECKPOINTING: False})) if config.model.gradient_checkpointing else None,
        run=along_gpus(blueprint, counted, price, pace, total, [gpus])[0],
        evaluation_hours=pace.seconds(evaluation(config, price)) / gpus / 3600,
        k=along_k(blueprint, price, gpus),
        inner_steps=along_inner_steps(blueprint, price, gpus),
        resolution=along_resolution(blueprint, networks, price, gpus),
        sharing=along_gpus(blueprint, counted, price, pace, total),
    )


def _share(given: float | None, gpu: str, recipe: str) -> tuple[float, str]:
    """(share of the peak, whose word that is)."""
    if given is not None:
        return given, "given"
    if found := measured_share(RESULTS, gpu, recipe):
        return found[0], f"measured, {found[1].name}"
    return ASSUMED, "assumed: no measurement of this GPU in bench/results"


def record(plan: Plan) -> dict:
    """All of it for JSON: operations, bytes, hours."""
    flops = lambda each: {name: value.all for name, value in each.stages.items()}
    of = lambda each: {"stages": flops(each), "total": each.needed.all, "done": each.done.all, "plain": each.plain}
    weighed = lambda found: {"parts": found.parts, "phases": found.phases, "peak": found.peak}
    return {
        "recipe": plan.recipe,
        "architecture": plan.source,
        "gpu": asdict(plan.card),
        "gpus": plan.gpus,
        "share_of_peak": plan.share,
        "share_from": plan.share_from,
        "iterations": plan.iterations,
        "prompts": plan.prompts,
        "flop_per_prompt": of(plan.cost),
        "flop_per_prompt_published": of(plan.published),
        "flop_per_prompt_published_alike": of(plan.alike) if plan.alike else None,
        "memory": weighed(plan.memory),
        "fits": plan.memory.peak <= plan.room,
        "fixes": [asdict(fix) for fix in plan.fixes],
        "memory_fixed": weighed(plan.fixed),
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.gpus,
        "kwh": plan.kilowatt_hours,
        "growth": {name: [asdict(step) for step in getattr(plan, name)] for name in ("k", "inner_steps", "resolution")},
        "sharing": [asdict(each) for each in plan.sharing],
    }
