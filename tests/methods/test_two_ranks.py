"""Methods on two ranks make the update of one process with the same rows. two_ranks.py is what the ranks run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from strop.engine.config.find import load
from strop.engine.config.settings import dump
from strop.engine.methods.offline import NoisedPairs

ROWS_ON = {"states": -4, "tied": 0, "log_prob": 1, "advantage": 0}  # the axis of the prompts, by field
EACH = {  # keys of a rank, and those with which one process takes the rows of both in one optimizer step
    "d3po": (("rollout.prompts=1", "optim.beta=5"), ("rollout.prompts=2", "optim.pairs=2", "optim.beta=5")),
    "ddpo": (("rollout.prompts=1", "optim.updates=1"), ("rollout.prompts=2", "optim.updates=1")),
}

PAIRS = {"diffusion_dpo": ("optim.accumulate=1", "data.drop_prompts=0")}


@pytest.fixture(scope="module")
def two_ranks(launch, recipe_of_method, tmp_path_factory):
    out, recipes = tmp_path_factory.mktemp("two-ranks"), []
    for method, keys in {**{method: keys for method, (keys, _) in EACH.items()}, **PAIRS}.items():
        file, *overrides = recipe_of_method(out, method, *keys, "optim.micro_batch=4")
        dump(load(file, overrides), Path(file))
        recipes.append(file)
    with launch(Path(__file__).with_name("two_ranks.py"), out, *recipes) as started:
        assert started.exit_code() == 0, started.said()[-3000:]
    return out


@pytest.mark.parametrize("method", EACH)
def test_two_ranks_make_the_update_of_one(two_ranks, method, method_recipe, unrolled):
    run = unrolled(method_recipe(method, *EACH[method][1], "optim.micro_batch=4"), moved=False)
    before = run.lora()
    of_rank = [load_file(two_ranks / f"{method}-{rank}.safetensors") for rank in (0, 1)]
    joined = {name: torch.cat([of[name] for of in of_rank], dim=ROWS_ON[name]) for name in of_rank[0]}
    rows, _ = run.method.collect(0)
    assert {name: value.shape for name, value in joined.items()} == {name: getattr(rows, name).shape for name in joined}
    assert not torch.equal(of_rank[0]["states"], of_rank[1]["states"])
    if method == "ddpo":  # relative to the rewards of both ranks
        torch.testing.assert_close(joined["advantage"].sum(), torch.tensor(0.0), atol=1e-4, rtol=0)
        assert joined["advantage"].abs().min() > 0.5
    run.update(replace(rows, **joined))
    check_update(run, before, load_file(two_ranks / f"{method}.safetensors"))


def test_two_ranks_make_the_update_of_one_that_has_the_pairs_of_both(two_ranks, method_recipe, unrolled):
    run = unrolled(method_recipe("diffusion_dpo", *PAIRS["diffusion_dpo"], "optim.micro_batch=8"), moved=False)
    before = run.lora()
    a, b = (load_file(two_ranks / f"diffusion_dpo-{rank}.safetensors") for rank in (0, 1))
    assert not torch.equal(a["x"], b["x"])
    x, target = (torch.cat([a[name], b[name]], dim=1) for name in ("x", "target"))
    cond = run.method.conditioning({"caption": ["ab"] * 8}, torch.zeros(8, dtype=torch.bool))
    loss, _ = run.method.loss(NoisedPairs(x, target, torch.cat([a["t"], b["t"]]), cond))
    run.parts.optimizer.backward(loss)
    run.parts.optimizer.step()
    check_update(run, before, load_file(two_ranks / "diffusion_dpo.safetensors"))


def check_update(run, before, of_two):
    """One process has moved as two have."""
    for name, value in of_two.items():
        moved = (value - before[name]).norm()
        assert (value - run.lora()[name]).norm() <= 1e-4 * moved + 1e-7, name
    assert any((value - before[name]).norm() > 1e-3 for name, value in run.lora().items())
