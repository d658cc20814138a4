"""speed/apply: the keys of the machine's speed leave an iteration's numbers as they are but for rounding."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.training import ModelConfig
from strop.engine.methods.models import Models
from strop.engine.methods.spo.rollout import Rollout
from strop.engine.methods.spo.update import Learner
from strop.engine.models.base_model import load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks
from strop.engine.speed.apply import prepare

CPU = torch.device("cpu")
ROLLOUT = {"k": 2, "num_steps": 5, "guidance": 3.0, "t_range": (0, 601), "threshold": 0.0}
PLAIN = {"fold_upsample": False, "merge_lora": False, "share_halves": False, "channels_last": False, "compile": False}


def run(folder, judge_folder, iterations, inner_steps=1, text_kv=True, device=CPU, watch=None, **keys):
    """Some iterations of two prompts: their pairs, the LoRA, and how many graphs were compiled by the end of each.

    watch: the iteration in which a wait for the GPU is warned of.
    """
    model = ModelConfig(path=str(folder), **PLAIN | keys)
    config = SPOConfig.model_validate(
        {
            "model": model.model_dump(),
            "judge": {"path": str(judge_folder), "kind": "pickscore"},
            "prompts": {"train": "none"},
            "rollout": ROLLOUT | {"inner_steps": inner_steps},
            "optim": {"lr": 1e-3, "micro_batch": 3},
            "run": {"dir": "none", "iterations": iterations, "seed": 0},
        }
    )
    models = Models.load(config, device)
    policy, judge, schedule = models.policy, models.judge, models.schedule(config.rollout)
    optimizer = build_optimizer(policy.unet, AdamWSettings.of(config), Ranks(0, 1, device))
    cond = replace(models.diffusion.encode(["a b", "c"]), judge=judge.encode(["a b", "c"]))
    rng = torch.Generator(device).manual_seed(0)
    rollout = Rollout(policy, models.diffusion, judge, schedule, config.rollout)
    learner, graphs, pairs = Learner(policy, schedule, config.optim), [], []
    for iteration in range(iterations):
        if iteration == watch:
            torch.cuda.set_sync_debug_mode("warn")
        with policy.sampling(cond, text_kv) as known:
            pairs.append(rollout(known, rng).pairs)
        for batch in learner.batches(pairs[-1], cond, rng):
            optimizer.backward(learner.loss(batch)[0])
            optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
        if iteration == watch:
            torch.cuda.set_sync_debug_mode("default")
    return SimpleNamespace(pairs=pairs, lora=policy.lora_state(), graphs=graphs)


def assert_alike(actual, expected):
    for a, b in zip(actual.pairs, expected.pairs, strict=True):
        assert torch.equal(a.step, b.step)
        assert torch.equal(a.prompt, b.prompt)
        torch.testing.assert_close(a.x_t, b.x_t, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.x_prev, b.x_prev, rtol=0, atol=1e-4)
    moved = 0
    for name, value in expected.lora.items():
        torch.testing.assert_close(actual.lora[name], value, rtol=0, atol=2e-4, msg=name)
        moved = max(moved, value.abs().max() if "lora_B" in name else 0)
    assert moved > 1e-3  # Adam's first step is the learning rate, whatever the gradient


@pytest.mark.parametrize("family, inner_steps", [("sd15", 1), ("sdxl", 2)])
def test_all_keys_of_speed_together_change_no_number_but_for_rounding(
    tiny_folder, tiny_sdxl_folder, clip_folder, family, inner_steps
):
    """Through loading, rollout and update; test_exact.py has each by itself."""
    folder = tiny_folder if family == "sd15" else tiny_sdxl_folder
    keys = {"fold_upsample": True, "channels_last": True, "unet_rows": 4, "decode_rows": 3, "share_halves": True}
    plain = run(folder, clip_folder, 2, inner_steps, text_kv=False)
    assert_alike(run(folder, clip_folder, 2, inner_steps, **keys, merge_lora=True), plain)


@pytest.fixture
def backends():
    """Those of PyTorch that know TF32; afterwards they are set as before."""
    known = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in known]
    yield known
    for backend, allowed in zip(known, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize(
    "keys, allowed",
    [
        ({"dtype": "float16"}, True),  # the judge in TF32, as published
        ({"dtype": "float32"}, False),  # PyTorch's own setting would have TF32 in convolutions
        ({"dtype": "float16", "tf32": False}, False),
        ({"dtype": "float32", "tf32": True}, True),
    ],
    ids=str,
)
def test_float32_goes_through_tf32_unless_the_model_is_of_it(tiny_folder, backends, keys, allowed):
    model = ModelConfig(path=str(tiny_folder), **keys)
    diffusion = LatentDiffusion.load(model, CPU)
    for backend in backends:
        backend.allow_tf32 = not allowed
    prepare(model, load_unet(model, CPU), diffusion.vae, None)
    assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]


@pytest.mark.slow
@pytest.mark.parametrize("inner_steps, graphs", [(1, 6), (3, 8)], ids=["spo", "mspo"])
def test_compiled_once_and_no_graph_after_the_first_iteration(
    tiny_folder, clip_folder, monkeypatch, inner_steps, graphs
):
    """Judge and decoder have one graph each; the UNet one for the trunk, one for the branches, and in the update one
    with the LoRA and one without, twice of each where the losers' own x_t may double the rows."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: whole(self, backend="eager", **options))
    torch._dynamo.reset()
    counters.clear()
    plain = run(tiny_folder, clip_folder, 3, inner_steps)
    compiled = run(tiny_folder, clip_folder, 3, inner_steps, compile="all")
    assert len(plain.pairs[0]) % 3, "the last micro-batch is a part of one"
    assert compiled.graphs == [graphs] * 3
    assert not counters["graph_break"]
    assert_alike(compiled, plain)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes of compiling, unless an earlier run has left its cache
def test_the_compilers_own_code_gives_the_same(tiny_folder, clip_folder):
    torch._dynamo.reset()
    compiled = run(tiny_folder, clip_folder, 2, compile="all", fold_upsample=True)
    assert_alike(compiled, run(tiny_folder, clip_folder, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "inner_steps, at", [(1, ["rollout.py"]), (2, ["rollout.py", "update.py"])], ids=["spo", "mspo"]
)
def test_an_iteration_waits_for_the_gpu_once_or_twice_and_at_optimizer_steps(tiny_folder, clip_folder, inner_steps, at):
    """Once for how many pairs are kept, once for which of them share x_t if not all: what comes after hangs on both."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tiny_folder, clip_folder, 2, inner_steps, device=torch.device("cuda", 0), watch=1)
    waits = [(Path(w.filename).name, w.lineno) for w in caught if "synchronizing" in str(w.message)]
    assert [file for file, _ in waits if file != "finite.py"] == at, waits
    assert len({line for file, line in waits if file == "finite.py"}) == 1, waits
