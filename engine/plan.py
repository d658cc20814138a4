"""What a recipe costs before it runs: `python -m strop.engine.plan RECIPE [key=value ...] --gpu a100 --gpus 4`.

Operations per prompt by stage, of strop and of the published code; memory by part, and what to turn where it does not
fit; hours and energy at a stated share of the GPU's peak; how all of it grows. Everything is counted on meta tensors,
in less than a minute, on any machine and without a download. Seconds are an estimate: nothing is timed here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from strop.engine.base_model import quiet_libraries
from strop.engine.blueprint import Blueprint
from strop.engine.cards import CARDS, Card, card, measured_share
from strop.engine.config import Config, load
from strop.engine.cost import Cost, cost, evaluation, published_cost, published_recipe
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.footprint import RESERVE, Footprint, footprint
from strop.engine.growth import Share, Step, along_gpus, along_inner_steps, along_k, along_resolution
from strop.engine.mend import Mend, mends
from strop.engine.plan_page import page
from strop.engine.prices import Networks, prices
from strop.engine.rollout import check_steps
from strop.engine.settings import varied
from strop.engine.tally import Tally, tally

ASSUMED = 0.4  # of the peak: about what the published runs used of theirs
CHECKPOINTING = "model.gradient_checkpointing"
RESULTS = Path(__file__).parents[1] / "bench" / "results"


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


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Prints what a recipe costs, before anything runs."""
    parser = argparse.ArgumentParser(prog="python -m strop.engine.plan", description=main.__doc__)
    parser.add_argument("recipe", help="YAML file, such as configs/sdxl.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as rollout.k=2 model.unet_rows=8")
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(CARDS)}")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them")
    parser.add_argument("--prompts", type=int, help="of the whole run, in place of run.iterations")
    parser.add_argument("--share", type=float, help=f"of the GPU's peak; where none was measured, {ASSUMED} is assumed")
    parser.add_argument("--family", choices=("sd15", "sdxl"), help="of a model that is not on this machine")
    parser.add_argument("--json", metavar="FILE", help="write all of it there as well")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    config = load(args.recipe, args.overrides)
    for name, value in (("--gpus", args.gpus), ("--prompts", args.prompts)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    if args.share is not None and not 0 < args.share <= 1:
        raise UserError(f"--share: found {args.share:g}, expected a share of the peak above 0 and at most 1")
    if args.json and not Path(args.json).parent.is_dir():
        raise UserError(f"--json: found {args.json}, expected a file in a folder that there is")
    made = make(config, Path(args.recipe).stem, args.gpu, args.gpus, args.prompts, args.share, args.family)
    if args.json:
        Path(args.json).write_text(json.dumps(record(made), indent=2) + "\n", encoding="utf-8")
    print(page(made))


def make(
    config: Config,
    recipe: str,
    gpu: str,
    gpus: int,
    prompts: int | None = None,
    share: float | None = None,
    family: str | None = None,
) -> Plan:
    """The plan of a recipe of this name on so many GPUs of a kind; prompts, share and family as on the command line.

    Raises UserError for an unknown GPU, and where the recipe's model or steps are none that strop trains.
    """
    device, blueprint = card(gpu), Blueprint.of(config, family)
    schedule = blueprint.schedule("cpu")
    check_steps(config.rollout, schedule)
    networks = Networks.of(blueprint)
    counted, price = tally(config, schedule), prices(blueprint, networks)
    share, share_from = _share(share, gpu, recipe)
    total = prompts or config.run.iterations * config.rollout.prompts * gpus
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
        run=along_gpus(blueprint, counted, price, device, share, total, [gpus])[0],
        evaluation_hours=device.seconds(evaluation(config, price), share) / gpus / 3600,
        k=along_k(blueprint, price, gpus),
        inner_steps=along_inner_steps(blueprint, price, gpus),
        resolution=along_resolution(blueprint, networks, price, gpus),
        sharing=along_gpus(blueprint, counted, price, device, share, total),
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


if __name__ == "__main__":
    main()
