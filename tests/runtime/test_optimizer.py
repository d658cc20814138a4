"""runtime/optimizer on one rank: gradients through half precision, clipped or not. Several ranks: test_ranks.py."""

import math
from importlib.metadata import version
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.errors import UserError
from strop.engine.runtime.optimizer import FLOAT16_SCALE, AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks

ALONE, TWO = (Ranks(0, size, torch.device("cpu")) for size in (1, 2))


def settings(dtype="float32", **optim):
    models = {"model": {"path": "none", "dtype": dtype}, "judge": {"path": "none"}, "prompts": {"train": "none"}}
    return AdamWSettings.of(SPOConfig(**models, optim=optim, run={"dir": "none", "iterations": 1}))


def optimizer(module, dtype="float32", **optim):
    return build_optimizer(module, settings(dtype, **optim), ALONE)


class HalfPath(nn.Module):
    """A float32 weight whose gradient comes back through float16, as a LoRA's does in a float16 base model."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, slope):
        return (self.weight.half() * slope.half()).float().sum()


def gradient(dtype, slope):
    module = HalfPath()
    optimizer(module, dtype, accumulate=2).backward(module(torch.tensor(slope)) * 1e-5)
    return 2 * module.weight.grad  # the mean over two micro-batches has half of it


def test_gradients_too_small_for_float16_arrive():
    exact = torch.tensor([3e-8, 5e-9])
    assert not torch.allclose(gradient("float32", [3e-3, 5e-4]), exact, rtol=1e-2, atol=0)  # what the scale is for
    torch.testing.assert_close(gradient("float16", [3e-3, 5e-4]), exact, rtol=2e-3, atol=0)


def learn(adamw, module, slope):
    """(whether the loss was finite, the norm) of a micro-batch whose gradient is `slope`, and whose loss shares it."""
    return bool(adamw.backward(module(torch.tensor(slope)))), adamw.step()


def test_a_step_that_overflows_is_left_out_and_the_next_gradient_counts_as_itself():
    module = HalfPath()
    adamw = optimizer(module, "float16", accumulate=2, weight_decay=0.0, lr=1e-2)
    assert learn(adamw, module, [1.0, 1.0]) == (True, None)
    adamw.backward(module(torch.tensor([6e4, 1.0])) * 10)
    assert adamw.step().isinf()
    assert (module.weight.tolist(), adamw.steps, adamw.gate.in_a_row) == ([1.0, 2.0], 0, 1)
    learn(adamw, module, [1.0, 1.0])
    learn(adamw, module, [1.0, 1.0])
    assert module.weight.tolist() == pytest.approx([0.99, 1.99], abs=1e-5)  # Adam's first step is lr, downhill
    assert (adamw.steps, adamw.gate.in_a_row) == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_micro_batch_that_is_not_finite_is_left_out_and_the_others_are_as_if_it_were_zero(bad):
    module, without = HalfPath(), HalfPath()
    adamw, other = (optimizer(each, accumulate=2, max_grad_norm=None) for each in (module, without))
    assert learn(adamw, module, [bad, 1.0]) == (False, None)
    assert module.weight.grad.tolist() == [0, 0]
    learn(other, without, [0.0, 0.0])
    assert learn(adamw, module, [3.0, 4.0]) == learn(other, without, [3.0, 4.0])
    assert torch.equal(module.weight, without.weight)
    assert (adamw.steps, adamw.gate.left_out, adamw.gate.in_a_row) == (1, 1, 0)
    for row in (1, 2):  # a step of such micro-batches alone is left out, not taken by momentum
        before = module.weight.clone()
        learn(adamw, module, [bad, 1.0])
        assert learn(adamw, module, [bad, 1.0])[1].isnan()
        assert torch.equal(module.weight, before)
        assert (adamw.steps, adamw.gate.left_out, adamw.gate.in_a_row) == (1, 2, row)


def test_the_scale_belongs_to_float16_alone():
    scales = {dtype: settings(dtype).loss_scale for dtype in ("float32", "bfloat16", "float16")}
    assert scales == {"float32": 1.0, "bfloat16": 1.0, "float16": FLOAT16_SCALE}


@pytest.mark.parametrize("limit, left", [(1.0, 1.0), (None, 5.0)], ids=["clipped", "free"])
def test_the_norm_is_that_before_clipping_and_null_never_clips(limit, left):
    module = nn.Linear(2, 1, bias=False)
    adamw = optimizer(module, max_grad_norm=limit)
    norms = []
    adamw.optimizer.register_step_pre_hook(lambda *_: norms.append(module.weight.grad.norm().item()))
    adamw.backward((module.weight * torch.tensor([[3.0, 4.0]])).sum())
    assert adamw.step().item() == pytest.approx(5.0)
    assert norms == [pytest.approx(left, rel=1e-4)]


def test_the_fused_step_is_the_plain_one():
    """On a GPU the step is fused; PyTorch has that for CPUs too, where the two can be compared."""
    plain, fused = nn.Linear(8, 4), nn.Linear(8, 4)
    fused.load_state_dict(plain.state_dict())
    adamw = optimizer(plain, lr=1e-2).optimizer
    assert adamw.param_groups[0]["fused"] is None, "the CPU keeps its own"
    other = torch.optim.AdamW(fused.parameters(), lr=1e-2, eps=1e-8, weight_decay=1e-4, fused=True)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        adamw.step()
        other.step()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


class Scaled(nn.Module):
    """A module with a parameter without dimensions, as CLIP has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


def broadcasting(known):
    """In place of deepspeed.initialize: what it does to parameters, but for those that it knows by their mark."""

    def initialize(model, **_):
        for p in model.parameters():
            if not (known and hasattr(p, "ds_optim_param")):
                p.data.view(torch.uint8)
        return SimpleNamespace(), None, None, None

    return initialize


def test_deepspeed_passes_over_scalars_by_their_mark(monkeypatch):
    monkeypatch.setattr(deepspeed, "initialize", broadcasting(known=True))
    module = Scaled()
    build_optimizer(module, settings(), TWO)
    assert not hasattr(module.logit_scale, "ds_optim_param")


def test_a_deepspeed_that_does_not_know_the_mark_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(deepspeed, "initialize", broadcasting(known=False))
    module = Scaled()
    with pytest.raises(UserError, match=rf"^DeepSpeed {version('deepspeed')} cannot broadcast .*logit_scale.* install"):
        build_optimizer(module, settings(), TWO)
    assert not hasattr(module.logit_scale, "ds_optim_param")
    build_optimizer(nn.Linear(2, 2), settings(), TWO)  # without scalars it is as good as any


def test_what_else_deepspeed_cannot_do_is_said_as_it_says_it(monkeypatch):
    def initialize(**_):
        raise RuntimeError("something else")

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(RuntimeError, match="something else"):
        build_optimizer(Scaled(), settings(), TWO)
