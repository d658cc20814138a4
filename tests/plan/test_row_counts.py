"""plan/row_counts: the rows of the published schedules, counted by hand, and those of the fast keys."""

import pytest
import torch

from strop.engine.config.training import Config
from strop.engine.plan.row_counts import tally
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

TRUNK, BRANCHES = "rollout/trunk", "rollout/branches"


@pytest.fixture
def counted(alphas):
    """counted(rollout={}, optim={}) -> the tally of a recipe, SD-1.5's where not said."""

    def count(rollout=(), optim=(), **model):
        config = Config.model_validate(
            {
                "model": {"path": "none", **model},
                "judge": {"path": "none"},
                "prompts": {"train": "none"},
                "rollout": dict(rollout),
                "optim": dict(optim),
                "run": {"dir": "none", "iterations": 1},
            }
        )
        given = config.rollout
        coefficients = DDIMCoefficients.build(alphas, given.num_steps, given.eta)
        return tally(config, Schedule(coefficients, given.guidance))

    return count


def test_the_schedule_of_sd15(counted):
    found = counted()
    assert found.of("unet", TRUNK) == 10 * 2 * 5  # steps 0 to 4, both halves
    assert found.of("unet", BRANCHES) == 10 * 4 * 2 * 15  # the last step is judged as it is
    assert found.of("decode") == found.of("judge") == 10 * 4 * 16
    assert found.pairs == found.made == 160
    assert found.sides == 1
    assert found.micro_batches == 16
    assert found.of("train") == found.of("reference") == 160 * 2  # winner and loser share their latent
    assert found.most == {"unet": 80, "decode": 40, "judge": 40, "train": 20, "reference": 20}


def test_the_schedule_of_sdxl(counted):
    found = counted({"prompts": 2, "k": 2, "inner_steps": 4, "merge_last": True}, {"micro_batch": 2})
    assert found.of("unet", TRUNK) == 2 * 2 * 5
    assert found.of("unet", BRANCHES) == 2 * 2 * 2 * 15
    assert found.of("decode") == found.of("judge") == 2 * 2 * 4
    assert found.pairs == 32
    assert found.sides == 2
    assert found.of("train") == found.of("reference") == (8 * 1 + 24 * 2) * 2  # at a fork they share their latent


def test_without_guidance_there_is_one_half(counted):
    both, one = counted(), counted({"guidance": 1.0})
    assert both.of("unet") == 2 * one.of("alone")
    assert both.of("alone") == one.of("unet") == 0
    for call in ("train", "reference"):
        assert both.of(call) == 2 * one.of(call)


def test_the_text_half_looks_ahead_and_the_chosen_branch_gets_the_other(counted):
    found = counted({"look_ahead": "text"})
    assert found.of("alone", BRANCHES) == 10 * 4 * 15
    assert found.of("unet", TRUNK) == 10 * 2 * 5
    assert found.of("alone", TRUNK) == 10 * 15


def test_judging_every_second_step(counted):
    found = counted({"judge_every": 2})
    assert found.of("judge") == 10 * 4 * 8
    assert found.pairs == 80
    assert found.of("unet", BRANCHES) == 10 * 4 * 2 * 8


def test_two_passes_share_the_reference(counted):
    once, twice = counted(), counted(optim={"passes": 2})
    assert twice.of("train") == 2 * once.of("train")
    assert twice.of("reference") == once.of("reference")
    assert twice.micro_batches == 2 * once.micro_batches
    assert twice.pairs == once.pairs


def test_half_of_the_pairs(counted):
    found = counted(optim={"keep_pairs": 0.5})
    assert (found.made, found.pairs) == (160, 80)
    assert found.of("train") == found.of("reference") == 80 * 2


def test_compiled_micro_batches_are_filled(counted):
    optim = {"micro_batch": 100}
    plain, filled = counted(optim=optim), counted(optim=optim, compile=True)
    assert plain.of("train") == 2 * 160
    assert filled.of("train") == 2 * 200


def test_it_draws_nothing_global(counted):
    state = torch.random.get_rng_state()
    counted()
    assert torch.equal(state, torch.random.get_rng_state())
