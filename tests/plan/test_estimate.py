"""plan/estimate and its text: tinyworld as a user plans it, mistakes, and every recipe at full size (slow)."""

import gc
import json
import re

import pytest
import torch

from strop.bench import full_size
from strop.engine.config.find import load
from strop.engine.config.settings import differences
from strop.engine.models.families.find import family_named
from strop.engine.plan import __main__ as plan_main
from strop.engine.plan import estimate
from strop.engine.plan.estimate import Plan
from strop.engine.plan.flops import published_flops, published_recipe, stage_flops
from strop.engine.plan.gpus import ASSUMED_SHARE, Gpu, find_gpu, gpu_at_share
from strop.engine.plan.memory import RESERVE, memory_use
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.row_counts import count_rows
from strop.engine.plan.text import render
from strop.engine.plan.unit_costs import Costs

ROOT = full_size.ROOT
TERA = 1e12
TINYWORLD = "configs/tinyworld.yaml"
SMALL = {"sd15_10gb": ("sd15", 10), "sdxl_24gb": ("sdxl", 24)}  # the recipe that each is, and the memory it is for


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def tinyworld_costs():
    """tinyworld's unit costs, measured once: no key that these tests change has a part in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        builder = ModelBuilder.of(load(TINYWORLD))
        return Costs(builder, published=True)


@pytest.fixture(scope="module")
def tinyworld(tinyworld_costs):
    """tinyworld's plan on 4 GPUs; models are found from the root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(estimate, "Costs", lambda *_, **__: tinyworld_costs)
        yield Plan(load(TINYWORLD), "tinyworld", gpu_at_share("a100", None, "tinyworld"), 4)


def test_hours_follow_from_operations(tinyworld):
    assert (tinyworld.items, tinyworld.iterations, tinyworld.gpu.share) == (14 * 10 * 4, 14, ASSUMED_SHARE)
    done = tinyworld.flops.done
    assert done.half == 0
    seconds = (done.tf32 / 156e12 + done.float32 / 19.5e12) / 0.4
    computing = 14 * 10 * seconds
    received = 14 * (tinyworld.run.zero + tinyworld.run.balance) / 300e9
    assert tinyworld.run.hours * 3600 == pytest.approx(computing + received)
    assert tinyworld.kilowatt_hours == pytest.approx(tinyworld.hours * 4 * find_gpu("a100").watts / 1000)


def test_scaling_has_the_recipe_once_and_costs_grow(tinyworld):
    for rows in (tinyworld.scaling["k"], tinyworld.scaling["resolution"]):
        (recipe,) = (row for row in rows if row.is_recipe)
        assert (recipe.flops, recipe.peak) == (tinyworld.flops.done.all, tinyworld.memory.peak)
        assert [row.flops for row in rows] == sorted(row.flops for row in rows)
    assert [row.value for row in tinyworld.scaling["resolution"]] == ["32x32", "64x64", "96x96"]
    assert [row.value for row in tinyworld.scaling["inner_steps"]] == ["1", "2", "4", "8"]


def test_more_gpus_leave_the_prompts_and_divide_the_steps(tinyworld):
    alone, two, four, *_ = tinyworld.by_gpus
    assert (alone.zero, alone.balance, alone.receiving) == (0, 0, 0)
    assert alone.optimizer_steps == 2 * two.optimizer_steps == 56 * 4
    assert [row.gpus for row in tinyworld.by_gpus] == [1, 2, 4, 8, 16, 32, 64]
    assert four == tinyworld.run


def test_what_a_user_reads(tinyworld):
    """The answers are the first four lines; columns are aligned and lines fit a terminal."""
    text = render(tinyworld)
    title, fits, hours, gpu_hours = text.splitlines()[:4]
    assert [word for word in ("tinyworld", "4 x A100", "560", "14") if word not in title] == []
    assert re.match(r"fits: 0\.\d+ of 78\.5 GB", fits)
    assert re.match(r"hours: .*40%.*assumed", hours)
    assert gpu_hours.startswith("GPU-hours: ")
    assert "bench/tinyworld/weights/sd" in text
    assert max(map(len, text.splitlines())) < 160
    columns = [line for line in text.splitlines() if re.match(r"(text|trunk|branches|decode|judge|total) ", line)]
    assert len(columns) == 6
    assert len({len(line) for line in columns}) == 1


def test_the_command_and_its_json(tmp_path, monkeypatch, capsys):
    target = tmp_path / "plan.json"
    options = ["--gpu", "H200", "--prompts", "100", "--share", "0.5", "--json", str(target)]
    plan_main.main([TINYWORLD, "rollout.k=2", "model.gradient_checkpointing=true", *options])
    text, record = capsys.readouterr().out, json.loads(target.read_text())
    assert gc.isenabled()
    assert re.match(r"tinyworld .*1 x H200.* 100 .* 10 ", text)
    assert re.search(r"50%.*given", text)
    assert "model.gradient_checkpointing=false: " in text  # which fits too
    assert record["fits"] is True
    stages = record["flop_per_prompt"]["stages"]
    assert record["flop_per_prompt"]["done"] == pytest.approx(sum(stages.values()))
    assert record["flop_per_prompt"]["total"] == pytest.approx(sum(stages.values()) - stages["recomputed"])
    assert [row["value"] for row in record["scaling"]["k"]] == ["2", "4", "8"]


def test_a_method_without_a_rollout_is_planned_per_pair(tinyworld_costs, monkeypatch):
    monkeypatch.setattr(estimate, "Costs", lambda *_, **__: tinyworld_costs)
    recipe = load("configs/tinyworld_diffusion_dpo.yaml", ["model.gradient_checkpointing=true"])
    plan = Plan(recipe, "offline", find_gpu("a100"), 2)
    pairs = recipe.optim.micro_batch * recipe.optim.accumulate
    assert (plan.counts.items, plan.items, plan.iterations) == (pairs, 300 * pairs * 2, 300)
    assert plan.run.optimizer_steps == 300
    record, text = plan.as_json(), render(plan)
    assert (record["pairs"], "prompts" in record) == (plan.items, False)
    assert record["flop_per_pair"]["stages"].keys() == {"encode", "update: policy", "update: reference", "recomputed"}
    assert record["flop_per_pair_published"] is None
    assert (record["scaling"]["k"], record["scaling"]["inner_steps"], len(plan.scaling["resolution"])) == ([], [], 3)
    assert [word for word in ("rollout", "prompt,", "per prompt", "published") if word in text] == []
    assert f"{plan.items:,} pairs" in text.splitlines()[0]


def test_lengths_that_the_method_refuses_are_no_rows(tinyworld_costs):
    """With two steps and more a segment, tinyworld's steps make fewer segments than the 13 that are passed over."""
    builder = ModelBuilder.of(load(TINYWORLD, ["rollout.judge_every=13"]))
    assert [row.value for row in estimate.along_key(builder, "rollout.inner_steps", tinyworld_costs, 1)] == ["1"]


@pytest.mark.parametrize(
    "gigabytes, overrides, lines",
    [
        (
            0.12,
            ["model.unet_rows=4", "model.decode_rows=4", "evaluate.batch=2", "rollout.prompts=2"],
            [
                r"will not fit.* update .*0\.26 .*0\.12 GB",
                r"  model\.gradient_checkpointing=true: .* 0\.094 GB",
            ],
        ),
        (0.01, [], [r"will not fit", r"  model\.dtype=float16"]),
    ],
    ids=["with other keys it fits", "it fits nowhere"],
)
def test_what_does_not_fit_says_which_keys(tinyworld_costs, monkeypatch, gigabytes, overrides, lines):
    tiny = Gpu("tiny", 1, 1, 1, gigabytes + RESERVE / 1e9, 1, 1, "string")
    monkeypatch.setattr(estimate, "Costs", lambda *_, **__: tinyworld_costs)
    text = render(Plan(load(TINYWORLD, overrides), "tinyworld", tiny, 1))
    assert [line for line in lines if not re.search(f"^{line}", text, flags=re.M)] == []


@pytest.mark.parametrize("small", SMALL)
def test_a_small_gpu_recipe_is_the_recipe_in_smaller_parts(small):
    recipe, exact = load(f"configs/{small}.yaml"), load(f"configs/{SMALL[small][0]}.yaml")
    parts = {"model.gradient_checkpointing", "model.unet_rows", "model.decode_rows", "optim.micro_batch"}
    parts |= {"optim.accumulate", "evaluate.batch", "evaluate.scorers", "run.dir"}
    assert not differences(exact, recipe, ignore=parts)
    assert recipe.optim.micro_batch * recipe.optim.accumulate == exact.optim.micro_batch * exact.optim.accumulate


def counted(recipe):
    """(builder, row counts, unit costs) of a recipe of configs/."""
    builder = ModelBuilder.of(load(f"configs/{recipe}.yaml"))
    return builder, count_rows(builder.config, builder.schedule("cpu")), Costs(builder, published=True)


@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL)
def test_a_small_gpu_recipe_fits(small):
    _, gigabytes = SMALL[small]
    assert memory_use(*counted(small), 1).peak + RESERVE < gigabytes * 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, at_most, published",
    [("sd15", 357, 432), ("sdxl_released", 1696, 1858), ("sd15_fast", 120, 432), ("sdxl_fast", 500, 1858)],
)
def test_operations_per_prompt(recipe, at_most, published):
    """Counted as the published figures are: without the LoRA, a backward pass as one forward.

    Those of SD-1.5 leave out one of 16 events, at which the final latents are judged.
    """
    builder, counts, costs = counted(recipe)
    assert stage_flops(builder, counts, costs).plain / TERA <= at_most
    event = 4 * (2.51 + 0.335 + 0.047) if recipe.startswith("sd15") else 0
    theirs = published_flops(published_recipe(builder), costs)
    assert theirs.plain / TERA == pytest.approx(published + event, rel=0.01)


@pytest.mark.slow
def test_a_latent_judge_leaves_out_look_ahead_and_decode():
    """What the recipe as published takes does not depend on it; no stage but trunk, judge and update is left."""
    keys = ("judge.kind=latent", "judge.guidance=1", "judge.path=nobody/judge")
    builder = ModelBuilder.of(load("configs/sd15.yaml", keys))
    counts, costs = count_rows(builder.config, builder.schedule("cpu")), Costs(builder, published=True)
    stages = stage_flops(builder, counts, costs)
    assert not {"branches", "decode"} & stages.stages.keys()
    assert costs.scores["judge"].flops.all / TERA == pytest.approx(0.261, rel=0.01)  # the UNet's down and middle blocks
    assert stages.done.all / TERA <= 125
    pixel = published_flops(published_recipe(counted("sd15")[0]), counted("sd15")[2])
    assert published_flops(published_recipe(builder), costs).plain == pixel.plain


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL)
def test_peak_memory_on_a_gpu(small):
    """One full-size iteration with random weights, beside which full_size keeps a float32 copy of the policy."""
    name, gigabytes = SMALL[small]
    family = family_named(name)
    architecture = family.architecture | {"judge": full_size.JUDGE}
    record = full_size.measure(load(f"configs/{small}.yaml"), family, architecture, torch.device("cuda"))
    planned = memory_use(*counted(small), 1)
    peak = record["peak_bytes"] - 2 * planned.parts["UNet"] - planned.parts["LoRA"]
    assert peak + RESERVE < gigabytes * 1e9
    phases = planned.phases.items()
    iteration = [size for phase, size in phases if phase == "update" or phase.startswith("rollout")]
    assert peak == pytest.approx(max(iteration), rel=0.15)
