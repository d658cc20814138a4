"""The plan of plan/estimate.py as a person reads it: tables of text, every unit beside its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .fit import Mend
from .flops import RECOMPUTED
from .memory import RESERVE
from .meter import Flops
from .scaling import Share, Step

if TYPE_CHECKING:
    from .estimate import Plan


def page(plan: Plan) -> str:
    """All sections, one after the other."""
    sections = (head(plan), operations(plan), memory(plan), hours(plan), growth(plan), sharing(plan))
    return "\n\n".join("\n".join(lines) for lines in sections)


def head(plan: Plan) -> list[str]:
    """What is planned, and from what."""
    counted = plan.counted
    each = f"prompts {counted.prompts}, pairs {counted.pairs} (all kept), micro-batches {counted.micro_batches}"
    return [
        f"{plan.recipe} on {plan.gpus} x {plan.card.name}: {plan.prompts:,} prompts, {plan.iterations:,} iterations",
        f"An iteration of one GPU: {each}.",
        f"Architecture: {plan.source}.",
    ]


def operations(plan: Plan) -> list[str]:
    """TFLOP and seconds by stage, beside the published code's."""
    ours, theirs = plan.cost, plan.published
    second = lambda flops: plan.card.seconds(flops, plan.share)
    whole = second(ours.done)
    rows = []
    for name, flops in ours.stages.items():
        former = theirs.stages.get(name)
        rows.append((name, tera(flops), tera(former) if former else "", *time_of(second(flops), whole)))
    total = ("total", tera(ours.done), tera(theirs.done), *time_of(whole, whole))
    titles = ("TFLOP per prompt", "this recipe", "published", "GPU seconds", "share")
    return table(titles, [*rows, total]) + ratios(plan)


def ratios(plan: Plan) -> list[str]:
    """What the published code needs more, in the ways one may count; and what runs in float32."""
    ours, theirs = plan.cost, plan.published
    times = lambda cost: f"{cost.needed.all / ours.needed.all:.2f} times as much"
    without = f" as the {tera(ours.needed)} without what is {RECOMPUTED}" if RECOMPUTED in ours.stages else ""
    lines = [f"The published code needs {times(theirs)}{without}."]
    if plan.alike:
        lines.append(f"With this recipe's rollout it would need {tera(plan.alike.needed)}, {times(plan.alike)}.")
    plain = f"{tera(ours.plain)} (published {tera(theirs.plain)})"
    lines.append(f"Without the LoRA, and a backward pass counted as one forward: {plain}.")
    full = replace(ours.done, half=0)
    if ours.done.half and full.all:
        slow = plan.card.seconds(full, plan.share) / plan.card.seconds(ours.done, plan.share)
        unit = "TF32" if full.tf32 else "float32"
        lines.append(f"In {unit} (judge): {full.all / ours.done.all:.1%} of the TFLOP, {slow:.0%} of the time.")
    return lines


def memory(plan: Plan) -> list[str]:
    """Bytes by part and phase, and whether they fit."""
    found = plan.memory
    rows = [(f"  {name}", giga(size), "") for name, size in found.parts.items()]
    rows += [("  together", giga(sum(found.parts.values())), ""), ("at most, with what stays", "", "")]
    rows += [
        (f"  {name}", giga(size), "  <- peak" if name == found.peak_phase else "")
        for name, size in found.phases.items()
    ]
    lines = table(("GB of memory on each GPU: what stays", "", ""), rows)
    of = f"{giga(plan.room)} GB ({plan.card.memory:g} less {giga(RESERVE)} left to context and allocator)"
    if found.peak <= plan.room:
        return [*lines, f"fits: {giga(found.peak)} of {of}.", *spare(plan)]
    return [*lines, f"will not fit: {found.peak_phase} takes {giga(found.peak)} of {of}.", *advice(plan)]


def spare(plan: Plan) -> list[str]:
    """Whether there is room for keeping what the recipe computes again."""
    if plan.unchecked is None or plan.unchecked.peak > plan.room:
        return []
    saved = tera(plan.cost.stages[RECOMPUTED])
    return [f"model.gradient_checkpointing=false: {giga(plan.unchecked.peak)} GB fit too, and {saved} TFLOP are saved."]


def advice(plan: Plan) -> list[str]:
    """What to turn, and whether that is enough."""
    fixes = [f"  {settings(fix)}: {fix.phase} {giga(fix.before)} -> {giga(fix.after)} GB" for fix in plan.fixes]
    lines = ["Keys to turn, the numbers staying as they are but for rounding:", *fixes] if fixes else []
    if plan.fixed.peak <= plan.room:
        return [*lines, f"With these it fits: {giga(plan.fixed.peak)} GB."]
    return [
        *lines,
        f"Even so it will not fit: {plan.fixed.peak_phase} takes {giga(plan.fixed.peak)} GB. A larger GPU would do, or "
        "keys that change the numbers:",
        "  model.dtype=float16, model.vae (one that is fine in float16), rollout.prompts, lora.rank, model.height",
    ]


def settings(fix: Mend) -> str:
    """`key=value key=value`, as the command line takes them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in fix.settings.items())


def hours(plan: Plan) -> list[str]:
    """Of the whole run."""
    all_gpus = plan.hours * plan.gpus
    whole = f"{short(plan.hours)} h, {short(all_gpus)} GPU-hours, {short(plan.kilowatt_hours)} kWh"
    evaluations = f"{short(60 * plan.evaluation_hours)} min of it for the evaluations of base and tuned model"
    return [
        f"Time and energy at {plan.share:.0%} of the GPU's peak ({plan.share_from})",
        f"  {whole} at {plan.card.watts:g} W; {evaluations}",
    ]


def growth(plan: Plan) -> list[str]:
    """Along k, the inner steps and the resolution; * marks the recipe's own."""
    groups = (("rollout.k", plan.k), ("rollout.inner_steps", plan.inner_steps), ("pixels", plan.resolution))
    own = next(step.flops for step in plan.k if step.own)
    rows = [row(key if i == 0 else "", step, own) for key, steps in groups for i, step in enumerate(steps)]
    titles = ("How it grows, per prompt", "(* this recipe)", "TFLOP", "of this", "pairs", "peak GB")
    return table(titles, rows)


def row(key: str, step: Step, own: float) -> Sequence[str]:
    """One line of the table of growth."""
    mark = step.value + (" *" if step.own else "  ")
    return (f"  {key}", mark, tera(step.flops), f"{step.flops / own:.2f}", f"{step.pairs:g}", giga(step.peak))


def sharing(plan: Plan) -> list[str]:
    """The same prompts on 1 to 64 GPUs."""
    link = f"{plan.card.link:g} GB/s each way between them ({plan.card.link_name}; between machines it is less)"
    titles = ("GPUs", "ZeRO MB", "balance MB", "computing s", "receiving s", "optimizer steps", "hours", "GPU-hours")
    return [
        f"The same {plan.prompts:,} prompts on more GPUs, {link}",
        "MB that each receives and seconds are those of an iteration; hours are without the evaluations.",
        *table(titles, [shared(each) for each in plan.sharing]),
    ]


def shared(each: Share) -> Sequence[str]:
    """One line of the table of GPUs."""
    mega = (short(each.zero / 1e6), short(each.balance / 1e6))
    seconds = (short(each.computing), short(each.receiving))
    run = (f"{each.optimizer_steps:,.0f}", short(each.hours), short(each.hours * each.gpus))
    return (f"{each.gpus:>4}", *mega, *seconds, *run)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    padded = lambda row: [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *padded(row)]).rstrip() for row in (titles, *rows)]


def time_of(seconds: float, whole: float) -> tuple[str, str]:
    """Seconds, and their share of the whole."""
    return short(seconds), f"{seconds / whole:.0%}"


def tera(flops: Flops | float) -> str:
    """TFLOP."""
    return short((flops.all if isinstance(flops, Flops) else flops) / 1e12)


def giga(size: float) -> str:
    """GB of bytes."""
    return short(size / 1e9)


def short(value: float) -> str:
    """A number with a digit after the point, where it is less than 1 with two that say something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
