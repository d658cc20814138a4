"""speed/merged_lora: the outputs of the LoRA, weights as they were, and which LoRAs stay as they are."""

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from strop.engine.speed.lora_linear import make_loras_lean
from strop.engine.speed.merged_lora import merged_lora

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def network(**keys):
    """Two linear layers with a LoRA each, away from its start."""
    net = nn.Sequential(OrderedDict(to_q=nn.Linear(6, 6), to_k=nn.Linear(6, 6)))
    inject_adapter_in_model(LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k"]} | keys), net)
    rng = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=rng)
        p.requires_grad_("lora_" in name)
    return net.eval()


@pytest.mark.parametrize("lean", [False, True], ids=["peft", "lean"])
@pytest.mark.parametrize("keys", [{}, {"lora_alpha": 6}], ids=str)
def test_the_output_is_the_loras_and_the_weights_are_put_back(keys, lean):
    net = network(**keys)
    if lean:
        make_loras_lean(net)
    expected, before = net(X), {name: value.clone() for name, value in net.state_dict().items()}
    base = net.to_q.get_base_layer()
    with merged_lora(net) as merged:
        assert merged
        assert not torch.equal(base.weight, before["to_q.base_layer.weight"])
        torch.testing.assert_close(net(X), expected, rtol=0, atol=1e-5)
    with pytest.raises(KeyboardInterrupt), merged_lora(net):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(net(X), expected)
    assert net(X).requires_grad


def second_adapter(net):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"]), net, adapter_name="other")
    net.to_k.set_adapter(["default", "other"])


def shared_weight(net):
    net.to_k.get_base_layer().weight = net.to_q.get_base_layer().weight


CASES = {
    "dora": ({"use_dora": True}, lambda net: None),
    "bias": ({"lora_bias": True}, lambda net: None),
    "two at once": ({}, second_adapter),
    "already merged": ({}, lambda net: net.to_k.merge()),
    "switched off": ({}, lambda net: net.to_k.enable_adapters(False)),
    "a shared weight": ({}, shared_weight),
}


@pytest.mark.parametrize("case", CASES)
def test_with_one_lora_that_is_more_all_run_as_they_are(case):
    keys, change = CASES[case]
    net = network(**keys)
    change(net)
    expected, before = net(X), {name: value.clone() for name, value in net.state_dict().items()}
    with merged_lora(net) as merged:
        assert not merged
        assert torch.equal(net(X), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(net(X), expected)
