"""speed/lora_linear: PEFT's numbers but for rounding, its parameters, and what it may not stand in for."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from strop.engine.speed.lora_linear import B_SCALE, LeanLora, LowRank, make_loras_lean

ROWS, CHANNELS, OUT, RANK = (3, 5), 12, 8, 4


def drawn(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(dtype=torch.float32, bias=True, **keys):
    """PEFT's linear layer with a LoRA in float32, away from its start."""
    net = nn.Sequential()
    net.add_module("to_q", nn.Linear(CHANNELS, OUT, bias=bias))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(drawn(*p.shape, seed=i, scale=0.3))
    options = {"r": RANK, "lora_alpha": RANK, "target_modules": ["to_q"]} | keys
    inject_adapter_in_model(LoraConfig(**options), net)
    net.to(dtype).requires_grad_(False)
    for i, (name, p) in enumerate(net.named_parameters()):
        if ".lora_" in name:
            p.data = drawn(*p.shape, seed=10 + i, scale=0.1).float()
            p.requires_grad_(True)
    return net


def run(net, dtype, grad_in=True):
    """(output, gradients of the input and of the LoRA)"""
    x = drawn(*ROWS, CHANNELS, seed=5).to(dtype).requires_grad_(grad_in)
    y = net(x)
    y.backward(drawn(*ROWS, OUT, seed=6).to(dtype))
    return y.detach(), x.grad, [p.grad for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad_in", [True, False], ids=["inner", "first"])
def test_numbers_are_those_of_peft(bias, grad_in):
    plain = layer(bias=bias)
    lean = copy.deepcopy(plain)
    assert make_loras_lean(lean) == 1
    expected, actual = run(plain, torch.float32, grad_in), run(lean, torch.float32, grad_in)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)
    assert (actual[1] is None) == (not grad_in)
    x = drawn(*ROWS, CHANNELS, seed=5).float()
    lean.to_q.enable_adapters(False)
    assert torch.equal(lean(x), lean.to_q.base_layer(x))


def test_gradients_in_float64():
    x, weight, bias = drawn(*ROWS, CHANNELS, seed=0), drawn(OUT, CHANNELS, seed=1), drawn(OUT, seed=2)
    a, b = drawn(RANK, CHANNELS, seed=3), drawn(OUT, RANK, seed=4)
    trained = [t.requires_grad_(True) for t in (x, a, b)]
    torch.testing.assert_close(LowRank.apply(x, weight, bias, a, b), x @ weight.t() + bias + x @ a.t() @ b.t())
    assert torch.autograd.gradcheck(lambda x, a, b: LowRank.apply(x, weight, bias, a, b), trained)


@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=str)
def test_half_precision_rounds_as_it_must(dtype, rounding):
    """Against PEFT with all of it in float64 on the same halved weights; the LoRA's gradients come in float32."""
    halved = layer(dtype)
    exact = copy.deepcopy(halved).double()
    make_loras_lean(halved)
    x_and_grad = drawn(*ROWS, CHANNELS, seed=5).to(dtype), drawn(*ROWS, OUT, seed=6).to(dtype)
    results = []
    for net, kind in ((halved, dtype), (exact, torch.float64)):
        x = x_and_grad[0].detach().to(kind).requires_grad_(True)
        net(x).backward(x_and_grad[1].to(kind))
        results.append([net(x).detach(), x.grad, *[p.grad for p in net.parameters() if p.requires_grad]])
    for actual, value in zip(*results, strict=True):
        assert (actual.double() - value).abs().max() < 4 * rounding * value.abs().max()
    assert [g.dtype for g in results[0][2:]] == [torch.float32] * 2


def test_a_young_lora_is_not_lost_in_float16():
    """B after a step of 1e-7, as in a warm-up: two of the smallest numbers of float16 that there are."""
    a, b = drawn(RANK, CHANNELS, seed=10, scale=0.1).float(), drawn(OUT, RANK, seed=7, scale=1e-7).float()
    x = 100 * drawn(*ROWS, CHANNELS, seed=5).half()
    expected = x.double() @ a.double().t() @ b.double().t()
    actual = LowRank.apply(x, torch.zeros(OUT, CHANNELS).half(), None, a, b).double()
    assert (B_SCALE * b).half().abs().max() > 2**-24 * 32
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "keys",
    [{"lora_alpha": 8}, {"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}],
    ids=lambda keys: next(iter(keys)),
)
def test_another_kind_of_lora_stays_as_it_is(keys):
    net = layer(**keys)
    assert make_loras_lean(net) == 0
    assert not any(isinstance(m, LeanLora) for m in net.modules())
