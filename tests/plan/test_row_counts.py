"""plan/row_counts: the rows of the published schedules, counted by hand, and those of the fast keys."""

import pytest
import torch

from strop.engine.plan.row_counts import count_rows
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

TRUNK, BRANCHES = "rollout/trunk", "rollout/branches"


@pytest.fixture
def rows_of(alphas, make_config):
    """rows_of(rollout={}, optim={}) -> the counts of a recipe, SD-1.5's where not said."""

    def count(rollout=(), optim=(), **model):
        config = make_config(model=model, rollout=dict(rollout), optim=dict(optim))
        coefficients = DDIMCoefficients.build(alphas, config.rollout.num_steps, config.rollout.eta)
        return count_rows(config, Schedule(coefficients, config.rollout.guidance))

    return count


def test_the_schedule_of_sd15(rows_of):
    state = torch.random.get_rng_state()
    counts = rows_of()
    assert counts.total("guided", TRUNK) == 10 * 2 * 5  # steps 0 to 4, both halves
    assert counts.total("guided", BRANCHES) == 10 * 4 * 2 * 15  # the last step is judged as it is
    assert counts.total("decode") == counts.total("judge") == 10 * 4 * 16
    assert counts.trained_rows == counts.pairs == 160
    assert (counts.x_t_per_row, counts.micro_batches) == (1, 16)
    assert counts.total("train") == counts.total("reference") == 160 * 2  # winner and loser share their latent
    assert counts.largest == {"guided": 80, "decode": 40, "judge": 40, "train": 20, "reference": 20}
    assert torch.equal(state, torch.random.get_rng_state())  # nothing global is drawn


def test_the_schedule_of_sdxl(rows_of):
    counts = rows_of({"prompts": 2, "k": 2, "inner_steps": 4, "merge_last": True}, {"micro_batch": 2})
    assert counts.total("guided", TRUNK) == 2 * 2 * 5
    assert counts.total("guided", BRANCHES) == 2 * 2 * 2 * 15
    assert counts.total("decode") == counts.total("judge") == 2 * 2 * 4
    assert (counts.trained_rows, counts.x_t_per_row) == (32, 2)
    assert counts.total("train") == counts.total("reference") == (8 * 1 + 24 * 2) * 2  # at a fork they share x_t


FAST = {  # keys, and the totals that they change from those of SD-1.5
    "no guidance": (
        {"rollout": {"guidance": 1.0}},
        {"guided": 0, "unguided": 10 * 5 + 10 * 4 * 15, "train": 160, "reference": 160},
    ),
    "text half looks ahead": (
        {"rollout": {"look_ahead": "text"}},
        {"guided": 10 * 2 * 5, ("unguided", BRANCHES): 10 * 4 * 15, ("unguided", TRUNK): 10 * 15},
    ),
    "judge every second step": (
        {"rollout": {"judge_every": 2}},
        {"judge": 10 * 4 * 8, "train": 80 * 2, ("guided", BRANCHES): 10 * 4 * 2 * 8},
    ),
    "two passes": ({"optim": {"passes": 2}}, {"train": 2 * 160 * 2, "reference": 160 * 2}),
    "half of the pairs": ({"optim": {"keep_pairs": 0.5}}, {"train": 80 * 2, "reference": 80 * 2}),
    "compiled": ({"optim": {"micro_batch": 100}, "compile": True}, {"train": 2 * 200}),
    "not compiled": ({"optim": {"micro_batch": 100}}, {"train": 2 * 160}),
}


@pytest.mark.parametrize("keys, totals", FAST.values(), ids=FAST)
def test_what_a_key_changes(rows_of, keys, totals):
    counts = rows_of(**keys)
    assert {call: counts.total(*([call] if isinstance(call, str) else call)) for call in totals} == totals


def test_pairs_and_micro_batches_of_the_keys_of_the_update(rows_of):
    once, twice, half = rows_of(), rows_of(optim={"passes": 2}), rows_of(optim={"keep_pairs": 0.5})
    assert (twice.micro_batches, twice.trained_rows) == (2 * once.micro_batches, once.trained_rows)
    assert (half.pairs, half.trained_rows) == (160, 80)
