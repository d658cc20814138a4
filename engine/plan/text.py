"""Writes the plan of estimate.py as text: the answers first, then tables in which every number has its unit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..runtime.output import table
from .flops import RECOMPUTED
from .memory import RESERVE
from .meter import Flops

if TYPE_CHECKING:
    from .estimate import Plan

HARDLY = 0.005  # of the time


def render(plan: Plan) -> str:
    """Returns all sections, one after the other."""
    sections = (answers(plan), operations(plan), memory(plan), energy(plan), scaling(plan), by_gpus(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def answers(plan: Plan) -> list[str]:
    """Says what is planned, whether it fits, how many hours and GPU-hours it takes, and what an iteration has."""
    counts, peak, phase = plan.counts, giga(plan.memory.peak), plan.memory.peak_phase
    reserved = f"{giga(plan.available)} GB ({plan.gpu.memory:g} less {giga(RESERVE)} left to context and allocator)"
    fits = f"fits: {peak} of {reserved}" if plan.fits else f"will not fit: {phase} takes {peak} of {reserved}"
    work = f"{plan.items:,} {counts.item}s, {plan.iterations:,} iterations"
    iteration = f"{counts.items} {counts.item}s, at most {counts.trained_rows} rows to train on"
    return [
        f"{plan.recipe} on {plan.gpus} x {plan.gpu.name}: {work}",
        f"{fits}.",
        f"hours: {short(plan.hours)}, at {plan.gpu.share:.0%} of the GPU's peak ({plan.gpu.share_source}).",
        f"GPU-hours: {short(plan.gpu_hours)}.",
        "",
        f"An iteration of one GPU: {iteration}, {counts.micro_batches} micro-batches.",
        f"Architecture: {plan.source}.",
    ]


def operations(plan: Plan) -> list[str]:
    """Says TFLOP and seconds by stage, beside the TFLOP of SPO's published code, and how much more that needs."""
    ours, published, same_rollout, seconds = plan.flops, plan.published, plan.same_rollout, plan.gpu.seconds
    stages, theirs = ours.stages | {"total": ours.done}, {}
    if published:
        theirs = dict.fromkeys(stages, "") | {name: tera(flops) for name, flops in published.stages.items()}
        theirs["total"] = tera(published.done)
    share = lambda flops: f"{seconds(flops) / seconds(ours.done):.0%}"
    columns = lambda name: [theirs[name]] if theirs else []
    rows = [(name, tera(flops), *columns(name), short(seconds(flops)), share(flops)) for name, flops in stages.items()]
    title = ["published"] if published else []
    lines = table((f"TFLOP per {plan.counts.item}", "this recipe", *title, "GPU seconds", "share"), rows)
    times = lambda flops: f"{flops.needed.all / ours.needed.all:.2f} times as much"
    without = f" as the {tera(ours.needed)} without what is {RECOMPUTED}" if RECOMPUTED in ours.stages else ""
    lines += [f"SPO's published code needs {times(published)}{without}."] if published else []
    if same_rollout:
        lines.append(f"With this recipe's rollout it would need {tera(same_rollout.needed)}, {times(same_rollout)}.")
    plain = f" (published {tera(published.plain)})" if published else ""
    lines.append(f"Without the LoRA, and a backward pass counted as one forward: {tera(ours.plain)}{plain}.")
    full = replace(ours.done, half=0)
    if ours.done.half and seconds(full) / seconds(ours.done) > HARDLY:
        unit = "TF32" if full.tf32 else "float32"
        lines.append(f"In {unit} (judge): {full.all / ours.done.all:.1%} of the TFLOP, {share(full)} of the time.")
    return lines


def memory(plan: Plan) -> list[str]:
    """Says the memory by part and by phase, and what to change."""
    use = plan.memory
    mark = lambda phase: "  <- peak" if phase == use.peak_phase else ""
    rows = [(f"  {part}", giga(size), "") for part, size in use.parts.items()]
    rows += [("  together", giga(sum(use.parts.values())), ""), ("at most, with what stays", "", "")]
    rows += [(f"  {phase}", giga(size), mark(phase)) for phase, size in use.phases.items()]
    lines = table(("GB of memory on each GPU: what stays", "", ""), rows)
    return lines + advice(plan)


def advice(plan: Plan) -> list[str]:
    """Says whether the recipe fits without gradient checkpointing too, or else which keys make it smaller."""
    lines, fixed, plain = [], plan.fixed_memory, plan.without_checkpointing
    if plan.fits and plain and plain.peak <= plan.available:
        saved = tera(plan.flops.stages[RECOMPUTED])
        return [f"model.gradient_checkpointing=false: {giga(plain.peak)} GB fit too, and {saved} TFLOP are saved."]
    if plan.fits:
        return []
    for fix in plan.fixes:
        settings = " ".join(f"{key}={str(value).lower()}" for key, value in fix.settings.items())
        lines.append(f"  {settings}: {fix.phase} {giga(fix.before)} -> {giga(fix.after)} GB")
    if lines:
        lines.insert(0, "Keys to change, the numbers staying as they are but for rounding:")
    if fixed.peak <= plan.available:
        return [*lines, f"With these it fits: {giga(fixed.peak)} GB."]
    prompts = "rollout.prompts, " if plan.counts.prompts else ""
    return [
        *lines,
        f"Even so it will not fit: {fixed.peak_phase} takes {giga(fixed.peak)} GB. A larger GPU would do, or "
        "keys that change the numbers:",
        f"  model.dtype=float16, model.vae (one that is fine in float16), {prompts}lora.rank, model.height",
    ]


def energy(plan: Plan) -> list[str]:
    """Says the energy of the whole run, and how much of its time goes to evaluation."""
    evaluations = f"{short(60 * plan.evaluation_hours)} min of the time for the evaluations of base and tuned model"
    return [f"Energy: {short(plan.kilowatt_hours)} kWh at {plan.gpu.watts:g} W; {evaluations}."]


def scaling(plan: Plan) -> list[str]:
    """Says the costs at other values of k, inner steps and resolution; * marks the recipe's own."""
    rows, titles = [], {"k": "rollout.k", "inner_steps": "rollout.inner_steps", "resolution": "pixels"}
    for name, group in plan.scaling.items():
        for i, row in enumerate(group):
            value, ratio = row.value + (" *" if row.is_recipe else "  "), row.flops / plan.flops.done.all
            costs = tera(row.flops), f"{ratio:.2f}", f"{row.rows:g}", giga(row.peak)
            rows.append((f"  {'' if i else titles[name]}", value, *costs))
    head = (f"How it scales, per {plan.counts.item}", "(* this recipe)", "TFLOP", "of this", "rows", "peak GB")
    return table(head, rows)


def by_gpus(plan: Plan) -> list[str]:
    """Says what the same prompts or pairs take on 1 to 64 GPUs."""
    link = f"{plan.gpu.link:g} GB/s each way between them ({plan.gpu.link_name}; between machines it is less)"
    rows = []
    for row in plan.by_gpus:
        each = (row.zero / 1e6, row.balance / 1e6, row.computing, row.receiving)
        run = (f"{row.optimizer_steps:,.0f}", short(row.hours), short(row.hours * row.gpus))
        rows.append((f"{row.gpus:>4}", *map(short, each), *run))
    titles = ("GPUs", "ZeRO MB", "balance MB", "computing s", "receiving s", "optimizer steps", "hours", "GPU-hours")
    return [
        f"The same {plan.items:,} {plan.counts.item}s on more GPUs, {link}",
        "MB that each receives and seconds are those of an iteration; hours are without the evaluations.",
        *table(titles, rows),
    ]


def tera(flops: Flops | float) -> str:
    """Writes operations as TFLOP."""
    return short((flops.all if isinstance(flops, Flops) else flops) / 1e12)


def giga(size: float) -> str:
    """Writes bytes as GB."""
    return short(size / 1e9)


def short(value: float) -> str:
    """Writes a number: below 1 with two significant digits, below 1,000 with one digit after the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
