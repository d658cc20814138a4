"""Writes the plan of estimate.py as text: the answers first, then tables in which every number has its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..runtime.output import table
from .fit import Fix
from .flops import RECOMPUTED
from .memory import RESERVE
from .meter import Flops
from .scaling import GpuRow, RecipeRow

if TYPE_CHECKING:
    from .estimate import Plan

HARDLY = 0.005  # of the time


def render(plan: Plan) -> str:
    """Returns all sections, one after the other."""
    sections = (answers(plan), basis(plan), operations(plan), memory(plan), hours(plan), scaling(plan), by_gpus(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def answers(plan: Plan) -> list[str]:
    """Says what is planned, whether it fits, and how many hours and GPU-hours it takes."""
    peak, phase = giga(plan.memory.peak), plan.memory.peak_phase
    reserved = f"{giga(plan.available)} GB ({plan.gpu.memory:g} less {giga(RESERVE)} left to context and allocator)"
    fits = f"fits: {peak} of {reserved}" if plan.fits else f"will not fit: {phase} takes {peak} of {reserved}"
    work = f"{plan.items:,} {plan.counts.item}s, {plan.iterations:,} iterations"
    return [
        f"{plan.recipe} on {plan.gpus} x {plan.gpu.name}: {work}",
        f"{fits}.",
        f"hours: {short(plan.hours)}, at {plan.share:.0%} of the GPU's peak ({plan.share_source}).",
        f"GPU-hours: {short(plan.gpu_hours)}.",
    ]


def basis(plan: Plan) -> list[str]:
    """Says what an iteration has and whose architecture is counted."""
    counts = plan.counts
    rows = f"at most {counts.trained_rows} rows to train on"
    return [
        f"An iteration of one GPU: {counts.items} {counts.item}s, {rows}, {counts.micro_batches} micro-batches.",
        f"Architecture: {plan.source}.",
    ]


def operations(plan: Plan) -> list[str]:
    """Says TFLOP and seconds by stage, beside the TFLOP of SPO's published code."""
    ours, published = plan.flops, plan.published
    seconds = lambda flops: plan.gpu.seconds(flops, plan.share)
    total_seconds = seconds(ours.done)
    theirs = published.stages | {"total": published.done} if published else {}
    rows = []
    for name, flops in (ours.stages | {"total": ours.done}).items():
        cell = [tera(theirs[name]) if name in theirs else ""] if published else []
        rows.append((name, tera(flops), *cell, *seconds_and_share(seconds(flops), total_seconds)))
    title = ["published"] if published else []
    return table((f"TFLOP per {plan.counts.item}", "this recipe", *title, "GPU seconds", "share"), rows) + ratios(plan)


def ratios(plan: Plan) -> list[str]:
    """Says how much more SPO's published code needs, in the ways one may count, and what runs in float32."""
    ours, published, same_rollout = plan.flops, plan.published, plan.published_same_rollout
    times = lambda flops: f"{flops.needed.all / ours.needed.all:.2f} times as much"
    without = f" as the {tera(ours.needed)} without what is {RECOMPUTED}" if RECOMPUTED in ours.stages else ""
    lines = [f"SPO's published code needs {times(published)}{without}."] if published else []
    if same_rollout:
        lines.append(f"With this recipe's rollout it would need {tera(same_rollout.needed)}, {times(same_rollout)}.")
    theirs = f" (published {tera(published.plain)})" if published else ""
    lines.append(f"Without the LoRA, and a backward pass counted as one forward: {tera(ours.plain)}{theirs}.")
    full = replace(ours.done, half=0)
    slow = plan.gpu.seconds(full, plan.share) / plan.gpu.seconds(ours.done, plan.share)
    if ours.done.half and slow > HARDLY:
        unit = "TF32" if full.tf32 else "float32"
        lines.append(f"In {unit} (judge): {full.all / ours.done.all:.1%} of the TFLOP, {slow:.0%} of the time.")
    return lines


def memory(plan: Plan) -> list[str]:
    """Says the memory by part and by phase, and what to change."""
    use = plan.memory
    mark = lambda phase: "  <- peak" if phase == use.peak_phase else ""
    rows = [(f"  {part}", giga(size), "") for part, size in use.parts.items()]
    rows += [("  together", giga(sum(use.parts.values())), ""), ("at most, with what stays", "", "")]
    rows += [(f"  {phase}", giga(size), mark(phase)) for phase, size in use.phases.items()]
    lines = table(("GB of memory on each GPU: what stays", "", ""), rows)
    return [*lines, *(unused(plan) if plan.fits else advice(plan))]


def unused(plan: Plan) -> list[str]:
    """Says whether the recipe fits without gradient checkpointing too."""
    plain = plan.memory_without_checkpointing
    if plain is None or plain.peak > plan.available:
        return []
    saved = tera(plan.flops.stages[RECOMPUTED])
    return [f"model.gradient_checkpointing=false: {giga(plain.peak)} GB fit too, and {saved} TFLOP are saved."]


def advice(plan: Plan) -> list[str]:
    """Says which keys make the recipe smaller, and whether that is enough."""
    fixes = [f"  {settings(fix)}: {fix.phase} {giga(fix.before)} -> {giga(fix.after)} GB" for fix in plan.fixes]
    lines = ["Keys to change, the numbers staying as they are but for rounding:", *fixes] if fixes else []
    fixed, prompts = plan.fixed_memory, "rollout.prompts, " if plan.counts.prompts else ""
    if fixed.peak <= plan.available:
        return [*lines, f"With these it fits: {giga(fixed.peak)} GB."]
    return [
        *lines,
        f"Even so it will not fit: {fixed.peak_phase} takes {giga(fixed.peak)} GB. A larger GPU would do, or "
        "keys that change the numbers:",
        f"  model.dtype=float16, model.vae (one that is fine in float16), {prompts}lora.rank, model.height",
    ]


def settings(fix: Fix) -> str:
    """Returns `key=value key=value`, as the command line takes them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in fix.settings.items())


def hours(plan: Plan) -> list[str]:
    """Says the energy of the whole run, and how much of its time goes to evaluation."""
    evaluations = f"{short(60 * plan.evaluation_hours)} min of the time for the evaluations of base and tuned model"
    return [f"Energy: {short(plan.kilowatt_hours)} kWh at {plan.gpu.watts:g} W; {evaluations}."]


def scaling(plan: Plan) -> list[str]:
    """Says the costs at other values of k, inner steps and resolution; * marks the recipe's own."""
    groups = (("rollout.k", plan.k), ("rollout.inner_steps", plan.inner_steps), ("pixels", plan.resolution))
    cells = lambda key, row: recipe_cells(key, row, plan.flops.done.all)
    rows = [cells(key if i == 0 else "", row) for key, group in groups for i, row in enumerate(group)]
    titles = (f"How it scales, per {plan.counts.item}", "(* this recipe)", "TFLOP", "of this", "rows", "peak GB")
    return table(titles, rows)


def recipe_cells(key: str, row: RecipeRow, recipe_flops: float) -> Sequence[str]:
    """Returns the cells of a row of the table of scaling."""
    value = row.value + (" *" if row.is_recipe else "  ")
    ratio = f"{row.flops / recipe_flops:.2f}"
    return (f"  {key}", value, tera(row.flops), ratio, f"{row.rows:g}", giga(row.peak))


def by_gpus(plan: Plan) -> list[str]:
    """Says what the same prompts or pairs take on 1 to 64 GPUs."""
    link = f"{plan.gpu.link:g} GB/s each way between them ({plan.gpu.link_name}; between machines it is less)"
    titles = ("GPUs", "ZeRO MB", "balance MB", "computing s", "receiving s", "optimizer steps", "hours", "GPU-hours")
    return [
        f"The same {plan.items:,} {plan.counts.item}s on more GPUs, {link}",
        "MB that each receives and seconds are those of an iteration; hours are without the evaluations.",
        *table(titles, [gpu_cells(row) for row in plan.by_gpus]),
    ]


def gpu_cells(row: GpuRow) -> Sequence[str]:
    """Returns the cells of a row of the table of GPUs."""
    mega = (short(row.zero / 1e6), short(row.balance / 1e6))
    seconds = (short(row.computing), short(row.receiving))
    run = (f"{row.optimizer_steps:,.0f}", short(row.hours), short(row.hours * row.gpus))
    return (f"{row.gpus:>4}", *mega, *seconds, *run)


def seconds_and_share(seconds: float, total: float) -> tuple[str, str]:
    """Returns the seconds and their share of the total as two cells."""
    return short(seconds), f"{seconds / total:.0%}"


def tera(flops: Flops | float) -> str:
    """Writes operations as TFLOP."""
    return short((flops.all if isinstance(flops, Flops) else flops) / 1e12)


def giga(size: float) -> str:
    """Writes bytes as GB."""
    return short(size / 1e9)


def short(value: float) -> str:
    """Writes a number: below 1 with two significant digits, below 1,000 with one digit after the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
