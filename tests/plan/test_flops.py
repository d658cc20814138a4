"""plan/flops: what plan says of a whole iteration, beside what PyTorch counts of a real one, stage by stage."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from strop.bench import ours, published
from strop.engine.config.settings import varied
from strop.engine.data.decided_pairs import DecidedPairs
from strop.engine.data.embeddings import Embeddings, TrainingPrompts
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.find import method_class
from strop.engine.methods.models import Models
from strop.engine.models.base_model import load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.plan.flops import published_flops, published_recipe, stage_flops
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import EXTRA_FORMULAS
from strop.engine.plan.row_counts import count_rows
from strop.engine.plan.unit_costs import Costs
from strop.engine.runtime.ranks import Ranks

CPU = torch.device("cpu")
PROMPTS = ["a b c", "d", "e f"]
EXACT = 1e-9
CASES = {
    "sd15": {"k": 4, "t_range": (0, 701)},
    "sdxl": {"k": 2, "inner_steps": 2, "t_range": (0, 701), "judge_every": 2, "look_ahead": "text"},
}


@pytest.fixture(scope="module", params=CASES)
def planned(request, make_config, tiny_folder, tiny_sdxl_folder, clip_folder):
    """(name, builder, unit costs) of a tiny recipe of each case."""
    folder = tiny_folder if request.param == "sd15" else tiny_sdxl_folder
    rollout = {"num_steps": 10, "threshold": 0.0, "prompts": len(PROMPTS)} | CASES[request.param]
    config = make_config(folder, clip_folder, rollout=rollout, optim={"micro_batch": 5})
    builder = ModelBuilder.of(config)
    return request.param, builder, Costs(builder, published=True)


class Stages:
    """A clock that counts operations, those of a stage within another to the inner one alone."""

    def __init__(self):
        self.counter = FlopCounterMode(display=False, custom_mapping=EXTRA_FORMULAS)
        self.flops, self.inside = {}, []

    @contextmanager
    def clock(self, stage):
        before = self.counter.get_total_flops()
        self.inside.append(0)
        yield
        took = self.counter.get_total_flops() - before
        self.flops[stage] = self.flops.get(stage, 0) + took - self.inside.pop()
        if self.inside:
            self.inside[-1] += took


def networks_of(config, spm, tokenizer):
    """(UNet, base model, judge) of a recipe."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    judge = StepAwarePreferenceModel(clip.freeze(), tokenizer, spm.mean, spm.std)
    return load_unet(config.model, CPU), LatentDiffusion.load(config.model, CPU), judge


def measured(kind, iteration, config, spm, tokenizer):
    """Operations by stage of one iteration."""
    models = kind(*networks_of(config, spm, tokenizer), config)
    stages = Stages()
    draws = lambda: (torch.Generator().manual_seed(3), torch.Generator().manual_seed(4))
    if kind is ours.Ours:
        iteration(models, PROMPTS, *draws())  # the judge's modulation is then known, as it is for the rest of a run
    with stages.counter, stages.clock("all"):
        iteration(models, PROMPTS, *draws(), stages.clock)
    return stages.flops


def check(planned_stages, stages, text):
    """Compares operations per prompt, as planned, with those of an iteration of the clock's `stages`."""
    planned = {stage: flops.all * len(PROMPTS) for stage, flops in planned_stages.items()}
    assert planned["text"] == pytest.approx(text, rel=EXACT)
    for stage in ("trunk", "branches", "decode", "judge"):
        assert planned[stage] == pytest.approx(stages[f"rollout/{stage}"], rel=EXACT), stage
    assert planned["update: policy"] + planned["update: reference"] == pytest.approx(stages["update"], rel=EXACT)


def test_an_iteration_of_strop(planned, spm, tokenizer):
    name, builder, costs = planned
    stages = measured(ours.Ours, ours.iteration, builder.config, spm, tokenizer)
    counts = count_rows(builder.config, builder.schedule("cpu"))
    text = stages["text"] + stages["all"]  # entering `sampling` belongs to no stage of the clock
    check(stage_flops(builder, counts, costs).stages, stages, text)
    assert name == "sd15" or counts.total("guided") + counts.total("unguided") < counts.prompts * 2 * 2 * 10


def test_an_iteration_as_published(planned, spm, tokenizer):
    """Which has no approximations."""
    _, builder, costs = planned
    exact = ModelBuilder.of(varied(builder.config, {"rollout.judge_every": 1, "rollout.look_ahead": "full"}))
    stages = measured(published.Published, published.iteration, exact.config, spm, tokenizer)
    check(published_flops(exact, costs).stages, stages, stages["text"])


def test_the_published_recipe_has_no_approximation(planned):
    name, builder, _ = planned
    rollout = published_recipe(builder).config.rollout
    assert (rollout.k, rollout.inner_steps) == ((4, 1) if name == "sd15" else (2, 4))
    assert (rollout.num_steps, rollout.judge_every, rollout.look_ahead) == (20, 1, "full")
    assert rollout.prompts == len(PROMPTS)


ONLINE = {"prompts": len(PROMPTS), "num_steps": 2}
METHODS = {  # sections of a recipe
    "d3po": {"rollout": ONLINE, "optim": {"micro_batch": 2}},
    "ddpo": {"rollout": ONLINE, "optim": {"updates": 3, "micro_batch": 2}},
    "spo audited": {
        "rollout": ONLINE | {"k": 2, "t_range": (0, 999), "threshold": 0.0},
        "audit": {"path": "none", "every": 4, "prompts": 1},
    },
    "gradspo": {"rollout": ONLINE | {"k": 2, "t_range": (0, 999), "threshold": 0.0}, "optim": {"micro_batch": 5}},
    "diffusion_dpo": {"optim": {"micro_batch": 2, "accumulate": 2}, "data": {"source": "module:factory"}},
    "mapo": {"optim": {"micro_batch": 2, "accumulate": 2}, "data": {"source": "module:factory"}},
}


class RandomPairs(Models):
    """The models of a run whose pairs are random images."""

    def pairs(self, config, ranks):
        image = torch.rand(3, *self.diffusion.image_size)
        pair = {"image_0": image, "image_1": image, "caption": "a b c", "label_0": 1.0, "label_1": 0.0}
        return DecidedPairs([pair] * 4, ties=0)


def iteration_of(config, networks):
    """Operations by stage of one iteration of any method, as methods/loop.py runs it."""
    stages, ranks = Stages(), Ranks(0, 1, CPU)
    models = RandomPairs.of(config, networks[0], *networks[1:])
    models = replace(models, auditor=models.judge if config.auditor else None)
    live = SimpleNamespace(counted=lambda items, total, stage: items)
    session = SimpleNamespace(ranks=ranks, clock=stages.clock, live=live, dir=None)
    prompts = PROMPTS if config.prompts_per_iteration else []
    with stages.counter:
        with stages.clock("text"):
            embeddings = Embeddings(models.diffusion, models.judge, [prompts], models.auditor) if prompts else None
        texts = TrainingPrompts(prompts, embeddings, len(prompts), 0, ranks)
        method = method_class(config)(config, models, texts, session)
        method.collect(0)  # the judge's modulation is then known
        stages.flops = {"text": stages.flops["text"]}
        with stages.clock(method.stage):
            rows, _ = method.collect(0)
        with stages.clock("update"):
            for batch in method.batches(rows):
                method.loss(batch)[0].backward()
    return stages.flops


@pytest.fixture(scope="module")
def costs_of():
    """costs_of(builder) -> unit costs of the tiny model, measured once for each guidance and rank of the update."""
    known = {}

    def costs(builder):
        key = builder.config.guided_update, builder.config.lora.rank, builder.config.auditor
        if key not in known:
            known[key] = Costs(builder)
        return known[key]

    return costs


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_of_each_method(make_config, tiny_folder, clip_folder, spm, tokenizer, costs_of, method):
    sections = METHODS[method]
    if "audit" in sections:  # by the judge itself
        sections = sections | {"audit": sections["audit"] | {"path": str(clip_folder)}}
    config = make_config(tiny_folder, clip_folder, method=method.partition(" ")[0], **sections)
    builder = ModelBuilder.of(config)
    counts = count_rows(config, builder.schedule("cpu"))
    planned = stage_flops(builder, counts, costs_of(builder)).stages
    planned = {stage: flops.all * counts.items for stage, flops in planned.items()}
    stages = iteration_of(config, networks_of(config, spm, tokenizer))
    update = [planned.pop(stage) for stage in list(planned) if stage.startswith("update")]
    assert sum(update) == pytest.approx(stages.pop("update"), rel=EXACT)
    text = stages.pop("text") + stages.pop("rollout", 0)  # entering `sampling`
    assert planned.pop("text", 0) == pytest.approx(text, rel=EXACT)
    counted = {stage.removeprefix("rollout/"): flops for stage, flops in stages.items() if flops}
    if config.auditor:
        counted["audit"] /= config.auditor.every
    assert planned == pytest.approx(counted, rel=EXACT)


def test_spos_published_code_beside_another_method_with_its_rollout(make_config, tiny_sdxl_folder, clip_folder):
    """Whose own inner steps are fixed to one."""
    config = make_config(tiny_sdxl_folder, clip_folder, method="gradspo", rollout={"prompts": 3})
    recipe = published_recipe(ModelBuilder.of(config)).config
    assert (recipe.method, recipe.rollout.k, recipe.rollout.inner_steps, recipe.rollout.prompts) == ("spo", 2, 4, 3)
