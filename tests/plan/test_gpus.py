"""plan/gpus: which GPUs are known, seconds at a share of their peak, and shares that were measured."""

import json

import pytest

from strop.engine.errors import UserError
from strop.engine.plan.gpus import CARDS, card, measured_share
from strop.engine.plan.meter import Flops


def test_each_unit_takes_its_own_time():
    a100 = card("A100")
    assert a100.seconds(Flops(half=312e12), 1) == pytest.approx(1)
    assert a100.seconds(Flops(312e12, 156e12, 19.5e12), 0.5) == pytest.approx(6)


def test_no_card_does_float32_faster_than_half_precision():
    for each in CARDS.values():
        assert each.half > each.tf32 >= each.float32 > 0
        assert each.memory > 0
        assert each.watts > 0


@pytest.mark.parametrize("key, hint", [("a1000", "did you mean a100"), ("tpu", "expected one of a10, a100")])
def test_an_unknown_card_lists_the_known(key, hint):
    with pytest.raises(UserError, match=f"--gpu: found '{key}'") as error:
        card(key)
    assert hint in str(error.value)


def test_a_measured_share_is_taken_of_the_same_recipe_first(tmp_path):
    write = lambda name, **record: (tmp_path / name).write_text(json.dumps(record))
    assert measured_share(tmp_path, "a100", "sd15") is None
    write("a.json", gpu="a100", recipe="sdxl", share_of_peak=0.6)
    write("b.json", gpu="h100", recipe="sd15", share_of_peak=0.7)
    write("c.json", gpu="a100", recipe="sd15")
    (tmp_path / "d.json").write_text("no JSON")
    assert measured_share(tmp_path, "a100", "sd15") == (0.6, tmp_path / "a.json")
    write("e.json", gpu="a100", recipe="sd15", share_of_peak=0.5)
    assert measured_share(tmp_path, "a100", "sd15") == (0.5, tmp_path / "e.json")
    assert measured_share(tmp_path / "nowhere", "a100", "sd15") is None
