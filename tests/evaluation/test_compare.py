"""evaluation/compare: differences and their intervals, by hand."""

import math

import pytest
import torch

from strop.engine.evaluation.compare import paired_delta, rate_delta


def test_paired_interval_by_hand():
    # differences 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 3
    compared = paired_delta(torch.tensor([1.0, 1.0, 1.0, 1.0]), [2.0, 3.0, 4.0, 7.0])
    half = 1.96 * math.sqrt(14 / 3) / 2
    assert (compared["base"], compared["tuned"], compared["delta"]) == (1.0, 4.0, 3.0)
    assert compared["ci95"] == pytest.approx([3 - half, 3 + half], rel=1e-12)


def test_a_common_offset_does_not_widen_the_paired_interval_and_one_pair_has_none():
    base = torch.tensor([0.0, 100.0, -50.0], dtype=torch.float64)
    assert paired_delta(base, base + 0.25)["ci95"] == pytest.approx([0.25, 0.25])
    assert paired_delta([0.5], [0.75]) == {"base": 0.5, "tuned": 0.75, "delta": 0.25, "ci95": None}


@pytest.mark.parametrize(
    "base, tuned", [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])], ids=["none", "unequal", "matrix"]
)
def test_scores_that_are_no_pairs(base, tuned):
    with pytest.raises(ValueError, match="paired scores"):
        paired_delta(base, tuned)


def test_two_rates_of_right_answers_by_hand():
    compared = rate_delta(0.5, 0.8, 100)
    half = 1.96 * math.sqrt((0.25 + 0.16) / 100)
    assert (compared["base"], compared["tuned"], compared["delta"]) == (0.5, 0.8, pytest.approx(0.3))
    assert compared["ci95"] == pytest.approx([0.3 - half, 0.3 + half])
    assert rate_delta(0.5, 0.8, 400)["ci95"] == pytest.approx([0.3 - half / 2, 0.3 + half / 2])


def test_rates_with_nothing_to_answer_have_no_interval_and_certain_ones_a_point():
    assert rate_delta(0.0, 0.0, 0) == {"base": 0.0, "tuned": 0.0, "delta": 0.0, "ci95": None}
    assert rate_delta(0.0, 1.0, 9)["ci95"] == [1.0, 1.0]
