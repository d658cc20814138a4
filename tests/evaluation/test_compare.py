"""evaluation/compare: differences, their intervals and p-values, by hand and by simulation."""

import math

import pytest
import torch
from scipy.stats import ttest_ind

from strop.engine.evaluation.compare import beyond_chance, paired_delta, rate_delta, two_means
from strop.engine.evaluation.intervals import ENOUGH


def test_students_interval_by_hand():
    # differences 1, 2, 3, 6, -1, 1, 2, 2: mean 2, squared deviations 1 + 0 + 1 + 16 + 9 + 1 + 0 + 0 = 28
    base = torch.tensor([1.0, 5.0, 1.0, -7.0, 0.5, 1.0, 1.0, 100.0])
    compared = paired_delta(base, base + torch.tensor([1.0, 2, 3, 6, -1, 1, 2, 2]))
    error, t = math.sqrt(28 / 7 / 8), 2.3646242515927844  # the 97.5% quantile at 7 degrees of freedom, from a table
    assert (compared["delta"], compared["n"]) == (2.0, 8)
    assert compared["ci95"] == pytest.approx([2 - t * error, 2 + t * error], rel=1e-6)
    assert compared["p"] == pytest.approx(0.0255, abs=5e-4)  # t = 2.828


def test_paired_rates_by_hand():
    """Of a hundred pictures, eight get right and two wrong, the others stay as they were."""
    base = torch.tensor([0.0] * 30 + [1.0] * 70)
    tuned = base.clone()
    tuned[:8], tuned[-2:] = 1.0, 0.0
    compared = paired_delta(base, tuned)
    up, down = 9 / 102, 3 / 102
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 102)
    assert compared["delta"] == pytest.approx(0.06)
    assert compared["ci95"] == pytest.approx([up - down - half, up - down + half])
    assert compared["p"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # at most 2 of 10 tosses, on either side


@pytest.mark.parametrize(
    "base, tuned, interval, p",
    [
        ([1.0] * ENOUGH, [1.0] * ENOUGH, "wide", 1.0),  # rates: alike answers may differ elsewhere
        ([0.3] * ENOUGH, [0.3] * ENOUGH, None, 1.0),
        ([0.25] * ENOUGH, [0.5] * ENOUGH, None, None),
        ([0.1, 0.2, 0.3, 0.5] * 1, [0.2, 0.4, 0.9, 0.6], None, None),  # too few
    ],
    ids=["rates alike", "scores alike", "all by the same", "too few"],
)
def test_alike_answers_have_no_interval_of_zero_width(base, tuned, interval, p):
    compared = paired_delta(base, tuned)
    assert compared["p"] == p
    if interval is None:
        assert compared["ci95"] is None
    else:
        low, high = compared["ci95"]
        assert low < -0.1 < 0.1 < high


@pytest.mark.parametrize(
    "base, tuned", [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])], ids=["none", "unequal", "matrix"]
)
def test_scores_that_are_no_pairs(base, tuned):
    with pytest.raises(ValueError, match="paired scores"):
        paired_delta(base, tuned)


def test_two_rates_by_hand():
    compared = rate_delta(56 / 70, 48 / 70, 70)  # Wilson: 0.6923 to 0.8771, and 0.5695 to 0.7829
    assert compared["ci95"] == pytest.approx(
        [-0.1143 - math.hypot(0.6857 - 0.5695, 0.8771 - 0.8), -0.1143 + math.hypot(0.7829 - 0.6857, 0.8 - 0.6923)],
        abs=2e-3,
    )
    assert compared["p"] == pytest.approx(0.122, abs=2e-3)
    assert rate_delta(0.0, 0.0, 3)["ci95"] is None
    certain = rate_delta(1.0, 1.0, 20)
    assert certain["p"] == 1.0
    assert certain["ci95"][0] < -0.1 < 0.1 < certain["ci95"][1]


def test_welchs_p():
    assert two_means([1.0, 2, 3, 4], [1.0, 2, 3, 4]) == 1.0
    first, last = [1.0, 2, 3, 4], [6.0, 8, 10, 12, 7]
    assert two_means(first, last) == pytest.approx(ttest_ind(first, last, equal_var=False).pvalue, rel=1e-9)
    assert two_means([1.0, 1.0], [2.0, 2.0]) == 1.0


def test_many_scores_are_corrected_together():
    rows = {name: {"delta": delta, "p": p} for name, delta, p in (("a", 1, 0.01), ("b", -1, 0.03), ("c", 1, 0.04))}
    assert beyond_chance(rows) == {"a": 1, "b": 0, "c": 0}
    assert beyond_chance({"b": rows["b"]}) == {"b": -1}
    assert beyond_chance({"old": {"delta": 1.0, "ci95": [0.5, 1.5]}}) == {"old": 0}


def test_no_change_is_claimed_where_there_is_none():
    """200 runs that change nothing but the noise, of 4 to 400 prompts and three scores: one in twenty may be."""
    rng, claimed = torch.Generator().manual_seed(0), 0
    for run in range(200):
        n = (4, 8, 16, 64, 400)[run % 5]
        shared = torch.randn(n, generator=rng)
        rows = {}
        for name, heavy in (("judge", False), ("quality", True)):
            change = torch.randn(n, generator=rng) * (torch.randn(n, generator=rng).exp() if heavy else 1.0)
            rows[name] = paired_delta(shared, shared + 0.3 * change)
        before, after = (torch.rand(n, generator=rng) < 0.9 for _ in range(2))
        rows["alignment"] = paired_delta(before.double(), after.double())
        claimed += any(beyond_chance(rows).values())
    assert claimed <= 10, "at most 5 %"
