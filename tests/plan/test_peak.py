"""plan/peak: seconds at the peak, against plan/estimate's counts of the same recipe."""

import subprocess
from pathlib import Path

import pytest
import torch

from strop.engine.config.find import load
from strop.engine.config.methods.ddpo import DDPOConfig
from strop.engine.models.families.find import family_named
from strop.engine.plan import peak
from strop.engine.plan.flops import stage_flops
from strop.engine.plan.gpus import GPUS
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.peak import seconds_on
from strop.engine.plan.row_counts import count_rows
from strop.engine.plan.unit_costs import Costs

GPU, SD15 = torch.device("cuda", 0), family_named("sd15")


@pytest.fixture(scope="module")
def recipe(tiny_folder, clip_folder):
    base = Path(__file__).parents[2] / "configs" / "sd15.yaml"
    models = (f"model.path={tiny_folder}", f"judge.path={clip_folder}", "judge.kind=pickscore")
    return load(base, [*models, "run.dir=none", "run.share_of_peak=true", "rollout.num_steps=5", "rollout.prompts=2"])


@pytest.fixture(scope="module")
def costs(recipe):
    """Unit costs of the recipe, which no key of the update changes."""
    builder = ModelBuilder.of(recipe, SD15)
    return Costs(builder)


@pytest.mark.parametrize("changes", [{}, {"passes": 2}, {"keep_pairs": 0.5}], ids=str)
def test_prompts_and_their_pairs_take_what_the_plan_says(recipe, costs, monkeypatch, changes):
    """All but the texts: with all pairs kept, a prompt's rollout and its pairs' updates."""
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update=changes)})
    monkeypatch.setattr(peak, "Costs", lambda builder: costs)
    prompt, pair = seconds_on(GPUS["a100"], recipe, SD15).values()
    builder = ModelBuilder.of(recipe, SD15)
    counts = count_rows(recipe, builder.schedule("cpu"))
    flops = stage_flops(builder, counts, costs)
    seconds = lambda flops: GPUS["a100"].seconds(flops)
    update = seconds(flops.stages["update: policy"] + flops.stages["update: reference"])
    assert pair * counts.pairs / counts.prompts == pytest.approx(update, rel=1e-9)
    assert prompt == pytest.approx(seconds(flops.done) - seconds(flops.stages["text"]) - update, rel=1e-9)
    assert prompt > 0


def test_the_update_is_among_the_prompts_of_a_run_that_reports_no_pairs(recipe, costs, monkeypatch):
    keys = {"rollout": recipe.rollout.model_dump(include={"prompts", "num_steps"}), "optim": {"updates": 1}}
    shared = {"model": recipe.model, "judge": recipe.judge, "prompts": recipe.prompts, "run": recipe.run}
    recipe = DDPOConfig(**shared, **keys)
    monkeypatch.setattr(peak, "Costs", lambda builder: costs)
    seconds = seconds_on(GPUS["a100"], recipe, SD15)
    builder = ModelBuilder.of(recipe, SD15)
    flops = stage_flops(builder, count_rows(recipe, builder.schedule("cpu")), costs)
    expected = GPUS["a100"].seconds(flops.done - flops.stages["text"])
    assert seconds == {"prompts": pytest.approx(expected, rel=1e-9)}


def test_a_run_that_asks_has_it_counted_by_another_process(recipe, costs, monkeypatch):
    """The other process measures for itself, what is expected comes from costs measured here."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(peak, "Costs", lambda builder: costs)
    expected = seconds_on(GPUS["a100"], recipe, SD15)
    monkeypatch.setattr(peak, "seconds_on", None)  # of this process
    assert peak.seconds_at_peak(recipe, SD15, GPU) == pytest.approx(expected, rel=1e-12)


def test_nothing_is_known_of_a_cpu_and_of_other_gpus_nor_counted_unasked(recipe, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert peak.seconds_at_peak(recipe, SD15, torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Another 12GB")
    assert peak.seconds_at_peak(recipe, SD15, GPU) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    unasked = recipe.model_copy(update={"run": recipe.run.model_copy(update={"share_of_peak": False})})
    assert peak.seconds_at_peak(unasked, SD15, GPU) == {}
