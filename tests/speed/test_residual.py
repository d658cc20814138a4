"""strop.engine.speed.residual: the lean block gives diffusers' own bits, and stands only where it does."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from strop.engine.speed.residual import make_residuals_lean

BLOCK = {"in_channels": 32, "temb_channels": 16, "groups": 8}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "keys", [{}, {"out_channels": 64}, {"temb_channels": None, "time_embedding_norm": "group"}], ids=str
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_block_has_the_same_bits(keys, grad):
    plain = ResnetBlock2D(**BLOCK | keys).eval()
    lean = copy.deepcopy(plain)
    assert make_residuals_lean(lean) == 1
    temb = drawn(3, 16, seed=1) if plain.time_emb_proj else None
    inputs = [drawn(3, 32, 6, 6).requires_grad_(grad) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        expected, actual = plain(inputs[0], temb), lean(inputs[1], temb)
    assert torch.equal(actual, expected)
    assert torch.equal(inputs[1], drawn(3, 32, 6, 6))  # what goes in stays as it is
    if grad:
        for out in (expected, actual):
            out.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


MORE = {"output_scale_factor": 2.0, "dropout": 0.1, "time_embedding_norm": "scale_shift", "skip_time_act": True}
MORE |= {"non_linearity": "gelu", "up": True, "down": True}


@pytest.mark.parametrize("key", MORE)
def test_a_block_that_does_more_stays_as_it_is(key):
    block = ResnetBlock2D(**BLOCK | {key: MORE[key]})
    assert make_residuals_lean(block) == 0
    assert type(block) is ResnetBlock2D


@pytest.mark.parametrize("name, in_unet", [("sd15", 8 + 2 + 12), ("sdxl", 6 + 2 + 9)])
def test_every_block_of_the_full_size_models_is_lean(architectures, name, in_unet):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architectures[name]["unet"])
        vae = AutoencoderKL.from_config(architectures[name]["vae"])
    assert make_residuals_lean(unet) == in_unet
    assert make_residuals_lean(vae.decoder) == 12 + 2
