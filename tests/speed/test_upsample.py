"""strop.engine.speed.upsample: the folded form is diffusers' own upsampling, value by value."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from strop.engine.speed.upsample import FoldedUpsample, fold_upsamplers, foldable


@pytest.fixture
def upsample():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Upsample2D(6, use_conv=True, out_channels=5).requires_grad_(False)


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (1, 6, 5, 3), (3, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_it_is_the_plain_one(upsample, shape, order):
    x = image(*shape).to(memory_format=order)
    expected = upsample.double()(x.double())
    actual = FoldedUpsample(upsample.float()).to(memory_format=order)(x)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


def test_its_gradient_is_the_plain_ones(upsample):
    x, weight = image(2, 6, 4, 4).requires_grad_(), image(2, 5, 8, 8)
    expected, actual = (
        torch.autograd.grad((module(x) * weight).sum(), x) for module in (upsample, FoldedUpsample(upsample))
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)


def test_another_size_than_the_double_is_left_to_the_former(upsample):
    x = image(1, 6, 4, 4)
    assert torch.equal(FoldedUpsample(upsample)(x, (7, 7)), upsample(x, (7, 7)))
    torch.testing.assert_close(FoldedUpsample(upsample)(x, (8, 8)), upsample(x), rtol=0, atol=2e-6)


def test_four_ninths_of_the_operations(upsample):
    x = image(2, 6, 4, 4)
    with FlopCounterMode(display=False) as plain:
        upsample(x)
    with FlopCounterMode(display=False) as folded:
        FoldedUpsample(upsample)(x)
    assert folded.get_total_flops() * 9 == plain.get_total_flops() * 4


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.03), (torch.float16, 4e-3)], ids=str)
def test_half_precision_rounds_the_sums_once(upsample, dtype, atol):
    x = image(1, 6, 4, 4).to(dtype)
    expected = upsample.to(dtype).double()(x.double())
    actual = FoldedUpsample(upsample.to(dtype))(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def test_all_upsamplers_of_the_full_size_models_can_be_folded(architectures):
    counts = {}
    for family in ("sd15", "sdxl"):
        for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            with torch.device("meta"):
                model = kind.from_config(architectures[family][name])
            counts[family, name] = sum(map(foldable, model.requires_grad_(False).modules()))
    assert counts == {("sd15", "unet"): 3, ("sd15", "vae"): 3, ("sdxl", "unet"): 2, ("sdxl", "vae"): 3}


def test_others_are_left_as_they_are(upsample):
    class Upsample2D(type(upsample)):
        """Of another library, or of a later version, that does something else under the same name."""

    same = {"use_conv": True, "out_channels": 5}
    layers = {
        "plain": upsample,
        "of another class": Upsample2D(6, **same),
        "without a convolution": type(upsample)(4),
        "with a norm": type(upsample)(4, **same, norm_type="ln_norm", eps=1e-5, elementwise_affine=True),
        "transposed": type(upsample)(4, use_conv_transpose=True),
        "of 5x5 pixels": type(upsample)(6, **same, kernel_size=5, padding=2),
    }
    model = torch.nn.ModuleDict(layers).requires_grad_(False)
    assert [name for name, layer in model.items() if foldable(layer)] == ["plain"]
    assert not foldable(copy.deepcopy(upsample).requires_grad_())  # in training
    assert fold_upsamplers(model) == 1
    assert {name for name, layer in model.items() if layer is not layers[name]} == {"plain"}
