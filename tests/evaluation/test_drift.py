"""evaluation/drift: what moves the pictures' statistics, and what does not."""

import pytest
import torch

from strop.engine.evaluation.drift import DRIFT, drift, statistics, strayed

CONTRASTS = torch.linspace(0.2, 1, 12).reshape(-1, 1, 1, 1)
PICTURES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * CONTRASTS - 0.5


AT_BORDER = torch.ones(32, 32)
AT_BORDER[4:-4, 4:-4] = 0


def saturated(images):
    grey = images.mean(1, keepdim=True)
    return (grey + 3 * (images - grey)).clamp(-1, 1)


def of(images):
    values = dict(zip(DRIFT, drift(statistics(PICTURES), statistics(images)).tolist(), strict=True))
    return values, strayed(values)


def test_the_means_by_hand():
    image = torch.tensor([-1.0, 0.0, 0.5]).reshape(1, 3, 1, 1).expand(1, 3, 20, 20)
    saturation, brightness, contrast, detail = statistics(image)[0, :4].tolist()
    assert (saturation, brightness) == pytest.approx((1.5, -0.5 / 3))
    assert (contrast, detail) == pytest.approx((0, 0), abs=1e-6)
    board = (torch.arange(20).reshape(-1, 1) + torch.arange(20)) % 2 * 2.0 - 1
    _, _, contrast, detail = statistics(board.expand(1, 3, 20, 20))[0, :4].tolist()
    assert contrast == pytest.approx(1, rel=2e-3)
    assert detail == pytest.approx(8 / 9, rel=0.05)  # the blur leaves a ninth inside


def test_the_same_pictures_have_not_drifted():
    values, out = of(PICTURES)
    assert list(values.values()) == pytest.approx([0] * 6 + [1, 1], abs=1e-5)
    assert out == []


def test_background_and_tint_by_hand():
    """Two pictures whose borders have a brightness of 0 and 0.4, and tints a quarter turn apart."""
    inside, border = torch.zeros(2, 3, 32, 32), torch.tensor([0.0, 0.4]).reshape(2, 1, 1, 1) * AT_BORDER
    colours = torch.tensor([[0.3, -0.3, 0.0], [0.1, 0.1, -0.2]]).reshape(2, 3, 1, 1)
    before = inside + border + colours
    moved = dict(zip(DRIFT, drift(statistics(before), statistics(before - 0.1 * AT_BORDER)).tolist(), strict=True))
    assert moved["background"] == pytest.approx(-0.1 / (0.4 / 2**0.5), rel=1e-5)
    assert (moved["tint"], moved["saturation"]) == pytest.approx((0, 0), abs=1e-5)
    turned = statistics(before + torch.tensor([0.0, 0.03, -0.03]).reshape(3, 1, 1))
    moved = dict(zip(DRIFT, drift(statistics(before), turned).tolist(), strict=True))
    deviation = ((0.2**2 + 0.4**2 + 0.2**2) / 2) ** 0.5  # of the two tints, over all three channels
    assert moved["tint"] == pytest.approx(0.03 * 2**0.5 / deviation, rel=1e-4)
    assert (moved["background"], moved["brightness"]) == pytest.approx((0, 0), abs=1e-5)


@pytest.mark.parametrize(
    "change, expected",
    [
        (saturated, "saturation"),
        (lambda images: images + 0.6, "brightness"),
        (lambda images: images - 0.6 * AT_BORDER, "background"),
        (lambda images: images + torch.tensor([0.2, 0.0, -0.2]).reshape(3, 1, 1), "tint"),
        (lambda images: images.flip(0), "layout"),
        (lambda images: images[:1] + 0.1 * images, "diversity"),
        (lambda images: 0.1 * images, "contrast"),
    ],
    ids=["saturated", "brighter", "darker behind", "redder", "elsewhere", "all alike", "flat"],
)
def test_what_strays(change, expected):
    assert expected in of(change(PICTURES))[1]
