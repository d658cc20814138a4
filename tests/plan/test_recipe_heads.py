"""The first lines of every recipe at full size say what `strop plan` counts for it on one card and on four (slow)."""

import re

import pytest

from strop.engine.config.find import load
from strop.engine.config.settings import RECIPES
from strop.engine.plan.estimate import Plan
from strop.engine.plan.gpus import ASSUMED_SHARE, gpu_at_share
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.row_counts import count_rows
from strop.engine.plan.text import giga, short

CARDS = {"sd15_10gb": "rtx3080", "sdxl_24gb": "rtx3090"}  # of the size that they are for
NAMES = sorted(file.stem for file in RECIPES.glob("sd*.yaml"))


def head(alone: Plan, four: Plan) -> str:
    """Returns the lines that a recipe should have of its plans on one card and on four."""
    memory = lambda plan: f"{giga(plan.memory.peak)} GB"
    hours = lambda plan: f"{short(plan.hours)} h (run.iterations={plan.iterations})"
    gpu = f"{alone.gpu.name} at {alone.gpu.share:.0%} of its peak"
    return (
        f"# `strop plan`, {alone.items:,} {alone.counts.item}s, {gpu}: one card takes {memory(alone)}\n"
        f"# and {hours(alone)}, four take {memory(four)} each and {hours(four)}.\n"
    )


def planned(name: str) -> tuple[Plan, Plan]:
    """Returns the plans, on one card and on four, of all that the recipe does on as many as its command line has."""
    file = RECIPES / f"{name}.yaml"
    config, ranks = load(str(file)), int(re.search(r"--num_gpus (\d+)", file.read_text())[1])
    items = config.run.iterations * count_rows(config, ModelBuilder.of(config).schedule("cpu")).items * ranks
    gpu = gpu_at_share(CARDS.get(name, "a100"), ASSUMED_SHARE, name)
    return tuple(Plan(config, name, gpu, gpus, items) for gpus in (1, 4))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_plan_counts(name):
    assert head(*planned(name)) in (RECIPES / f"{name}.yaml").read_text()


def test_every_recipe_says_it():
    """Of the others, tinyworld's need no GPU, and plan does not count the training of a judge."""
    said = re.compile(
        r"^# `strop plan`, [\d,]+ (prompt|pair)s, .*: one card takes [\d.]+ GB\n# and .*, four take", re.MULTILINE
    )
    assert [name for name in NAMES if said.search((RECIPES / f"{name}.yaml").read_text())] == NAMES
