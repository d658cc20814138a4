"""plan/memory and engine/plan/fit.py: parts and phases by hand, what the keys do to them, what is turned."""

from collections import Counter
from dataclasses import replace

import pytest

from strop.engine.config.settings import varied
from strop.engine.config.training import Config
from strop.engine.plan.fit import mends
from strop.engine.plan.memory import Footprint, decoding_bytes, footprint, gradient_bytes
from strop.engine.plan.meter import Flops
from strop.engine.plan.row_counts import Tally
from strop.engine.plan.unit_costs import Prices, UNetPrices, Weights

GB = 1e9
NO = Flops()
UNET = UNetPrices(
    *[NO] * 10,
    sample_peak=1 * GB,
    kept=0.0,
    merged=0.0,
    update_peak=8 * GB,
    checkpointed_peak=2 * GB,
)
WEIGHTS = Weights(5 * GB, 1 * GB, 0.5 * GB, 0, 3 * GB, 4 * GB, 1 * GB, lora=GB // 4)


class Blank:
    """As much of a Blueprint as a footprint reads."""

    latent_shape, size = (4, 8, 8), (64, 64)

    def __init__(self, config):
        self.config = config


@pytest.fixture
def config():
    return Config.model_validate(
        {
            "model": {"path": "none"},
            "judge": {"path": "none"},
            "prompts": {"train": "none"},
            "rollout": {"prompts": 2},
            "optim": {"micro_batch": 4},
            "evaluate": {"batch": 2},
            "run": {"dir": "none", "iterations": 1},
        }
    )


@pytest.fixture
def weigh():
    """weigh(config, ranks) -> its footprint: 8 images of 1 GB each at once, and 32 pairs."""
    price = Prices(UNET, UNET, NO, 2 * GB, NO, 2 * GB, NO, 0.5 * GB, NO, 0.25 * GB, NO, NO, 1 * GB, NO, 1 * GB, WEIGHTS)
    most = Counter(unet=16, decode=8, judge=8)
    counted = Tally(prompts=2, most=most, pairs=32, made=32)
    return lambda config, ranks=1: footprint(Blank(config), counted, price, ranks)


def test_parts_and_phases(config, weigh):
    found = weigh(config)
    assert found.parts["LoRA"] == 1 * GB
    assert found.parts["optimizer state"] == 2 * GB
    stays = sum(found.parts.values())
    assert stays == (5 + 1 + 0.5 + 4 + 1 + 2) * GB
    pairs = 32 * (3 * 4 * 4 * 64 + 2 * 8 + 1)  # numbers of three latents; step and prompt; shared
    assert found.phases == {
        "embedding the prompts": stays - 2 * GB + 3 * GB + 1 * GB + 1 * GB,
        "rollout: UNet": stays + pairs + 16 * GB,
        "rollout: decode": stays + pairs + 16 * GB,
        "rollout: judge": stays + pairs + 4 * GB + 2 * GB,
        "update": stays + 1 * GB + 2 * pairs + 8 * 8 * GB,
        "evaluation": stays + 4 * GB,
    }
    assert found.peak_phase == "update"


def test_each_key_makes_its_phase_smaller(config, weigh):
    before = weigh(config)
    for key, value, phase, less in (
        ("model.unet_rows", 4, "rollout: UNet", 12),
        ("model.decode_rows", 2, "rollout: decode", 16 - 2 * 8 * 0.5),  # its parts, and the whole they are joined to
        ("model.gradient_checkpointing", True, "update", 8 * 6),
        ("optim.micro_batch", 1, "update", 8 * 6),
    ):
        after = weigh(varied(config, {key: value}))
        assert before.phases[phase] - after.phases[phase] == pytest.approx(less * GB), key


def test_a_tiny_decoder_decodes_in_parts_too(config, weigh):
    parts = lambda decoder: weigh(varied(config, {"model.decode_rows": 2, "rollout.decoder": decoder})).phases
    assert parts("somebody/taesd")["rollout: decode"] == parts(None)["rollout: decode"]


def test_zero_shards_the_optimizer_and_then_the_gradients(config, weigh):
    alone, four = weigh(config), weigh(config, ranks=4)
    assert four.parts["optimizer state"] == (2 / 4 + 1 / 4) * GB
    assert "balance of pairs" in four.phases.keys() - alone.phases.keys()
    assert gradient_bytes(1, 1 * GB, 1) == 1 * GB
    assert gradient_bytes(1, 1 * GB, 4) - gradient_bytes(2, 1 * GB, 4) == 0.75 * GB


@pytest.mark.parametrize(
    "latents, at_once, expected", [(8, None, 80), (8, 8, 80), (8, 2, 2 * 8 * 3), (8, 5, 50 + 3 * 3), (3, 50, 30)]
)
def test_decoding_in_parts_keeps_what_came_out(latents, at_once, expected):
    assert decoding_bytes(10, 3, latents, at_once) == expected


def test_nothing_is_turned_where_it_fits(config, weigh):
    assert mends(config, weigh, 1000 * GB) == ([], weigh(config))


def test_what_is_turned_makes_it_fit(config, weigh):
    made, found = mends(config, weigh, 30 * GB)
    assert found.peak <= 30 * GB
    turned = {key: value for mend in made for key, value in mend.settings.items()}
    assert turned == {"model.gradient_checkpointing": True, "optim.micro_batch": 2, "optim.accumulate": 2}
    assert weigh(varied(config, turned)) == found
    assert all(mend.before > mend.after for mend in made)


def test_the_mildest_that_is_enough_is_turned(config, weigh):
    given = varied(config, {"model.gradient_checkpointing": True, "optim.micro_batch": 1})
    made, _ = mends(given, weigh, 26 * GB)
    turned = {key: value for mend in made for key, value in mend.settings.items()}
    assert turned == {"model.unet_rows": 8, "model.decode_rows": 4}


def test_what_can_be_turned_may_not_be_enough(config, weigh):
    made, found = mends(config, weigh, 5 * GB)
    assert found.peak > 5 * GB
    assert found.peak_phase == "rollout: decode"
    assert {"model.decode_rows": 2} in [mend.settings for mend in made]  # with fewer, the images are what is left


def test_the_peak_phase_is_the_largest():
    assert Footprint({}, {"a": 1.0, "b": 3.0}).peak_phase == "b"
    assert replace(Footprint({}, {"a": 1.0}), phases={"a": 2.0}).peak == 2.0
