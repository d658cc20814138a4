"""strop.kernels.adaln against a float64 truth written out, against F.layer_norm bit for bit, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from strop.kernels import adaln_modulate, gated_residual_adaln

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 17, 64), (1, 257, 1280), (4, 7, 769)]
EPS = 1e-5


def inputs(rows, length, width, dtype=torch.float32):
    """residual, branch, gate, weight, bias, shift, scale, in the order of gated_residual_adaln."""
    rng = torch.Generator().manual_seed(rows * 1000 + width)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    return (
        draw(rows, length, width) * 3 + 1,
        draw(rows, length, width),
        draw(rows, width),
        draw(width) + 1,
        draw(width),
        draw(rows, width),
        draw(rows, width),
    )


def truth(x, weight, bias, shift, scale):
    """LayerNorm from its definition, then the modulation, in float64."""
    x, weight, bias, shift, scale = (each.double() for each in (x, weight, bias, shift, scale))
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return (normal * weight + bias) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ops_are_the_float64_truth_and_agree_where_they_meet(shape):
    residual, branch, gate, weight, bias, shift, scale = inputs(*shape)
    h, y = gated_residual_adaln(residual, branch, gate, weight, bias, shift, scale, EPS)
    assert h.dtype == y.dtype == torch.float32
    expected = residual.double() + gate.double()[:, None] * branch.double()
    torch.testing.assert_close(h.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), truth(expected, weight, bias, shift, scale), rtol=2e-5, atol=2e-5)
    normed = adaln_modulate(h, weight, bias, shift, scale, EPS)
    assert torch.equal(normed, y)
    torch.testing.assert_close(normed.double(), truth(h, weight, bias, shift, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_modulation_it_is_layer_norm_bit_for_bit(shape):
    x, branch, _, weight, bias, shift, _ = inputs(*shape)
    none, one = torch.zeros_like(shift), torch.ones_like(shift)
    expected = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    assert torch.equal(adaln_modulate(x, weight, bias, none, none, EPS), expected)
    h, y = gated_residual_adaln(x, branch, one, weight, bias, none, none, EPS)
    assert torch.equal(h, x + branch)
    assert torch.equal(y, F.layer_norm(x + branch, x.shape[-1:], weight, bias, EPS))


def test_eps_is_that_of_the_norm():
    """A constant row has variance 0: only eps keeps it finite, and only eps decides a nearly constant one."""
    weight, bias, none = torch.ones(4), torch.zeros(4), torch.zeros(1, 4)
    assert torch.equal(adaln_modulate(torch.full((1, 2, 4), 3.0), weight, bias, none, none, 1e-5), torch.zeros(1, 2, 4))
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0]]])
    torch.testing.assert_close(adaln_modulate(x, weight, bias, none, none, 3.0), x / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_stay_narrow_and_near(dtype):
    x, _, _, weight, bias, shift, scale = inputs(2, 9, 48, dtype)
    found = adaln_modulate(x, weight, bias, shift, scale, EPS)
    assert found.dtype == dtype
    expected = truth(x, weight, bias, shift, scale)
    assert (found.double() - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


def test_gradients_by_finite_differences():
    given = [each.requires_grad_() for each in inputs(2, 3, 4, torch.float64)]
    assert gradcheck(lambda *g: gated_residual_adaln(*g, EPS), given)
    x, _, _, weight, bias, shift, scale = given
    assert gradcheck(lambda *g: adaln_modulate(*g, EPS), (x, weight, bias, shift, scale))


FITTING = {
    "residual": (2, 3, 8), "branch": (2, 3, 8), "gate": (2, 8), "weight": (8,), "bias": (8,), "shift": (2, 8),
    "scale": (2, 8),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("residual", (6, 8), "shape"),
        ("branch", (2, 1, 8), "shape"),
        ("gate", (1, 8), "shape"),
        ("gate", (2, 3, 8), "shape"),
        ("weight", (7,), "shape"),
        ("bias", (1,), "shape"),
        ("shift", (2, 7), "shape"),
        ("scale", (8,), "shape"),
        *((name, "meta", "meta.* cpu") for name in FITTING if name != "residual"),
        *((name, torch.bfloat16, "bfloat16.*float32.* residual") for name in FITTING if name != "residual"),
    ],
)
def test_what_does_not_fit_is_named(name, change, expected):
    """change: the shape, device or type that the argument has instead."""
    tensors = {key: torch.ones(size) for key, size in FITTING.items()}
    tensors[name] = torch.ones(change) if isinstance(change, tuple) else tensors[name].to(change)
    with pytest.raises(ValueError, match=f"^{name} .*{expected}"):
        gated_residual_adaln(**tensors)
    if name in ("weight", "bias", "shift", "scale"):
        x, *rest = (tensors[key] for key in ("residual", "weight", "bias", "shift", "scale"))
        with pytest.raises(ValueError, match=f"^{name} .*{expected.removesuffix('.* residual')}"):
            adaln_modulate(x, *rest)


def test_under_autocast_it_computes_in_float32():
    """As F.layer_norm does, so that a residual stream in float32 stays one."""
    residual, branch, gate, *rest = inputs(2, 3, 16)
    expected = gated_residual_adaln(residual, branch.bfloat16().float(), gate, *rest, EPS)
    with torch.autocast("cpu", torch.bfloat16):
        h, y = gated_residual_adaln(residual, branch.bfloat16(), gate, *rest, EPS)
    assert torch.equal(h, expected[0])
    assert torch.equal(y, expected[1])


def test_arguments_that_are_not_dense_give_the_same_and_none_is_modified():
    given = inputs(2, 3, 8)
    spread = [each.repeat_interleave(2, dim=-1)[..., ::2] for each in given]
    before = [each.clone() for each in spread]
    for found, expected in zip(gated_residual_adaln(*spread, EPS), gated_residual_adaln(*given, EPS), strict=True):
        assert torch.equal(found, expected)
    for after, original in zip(spread, before, strict=True):
        assert torch.equal(after, original)
