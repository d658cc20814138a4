"""Intervals, tests, agreement and strengths, against numbers by hand and other packages' answers."""

import itertools

import numpy as np
import pytest

from strop.engine.evaluation.intervals import Resampling, binomial_p, bootstrap_p, holm, percentiles, wilson
from strop.engine.study.agreement import ordinal_alpha
from strop.engine.study.bradley_terry import davidson


def test_wilson_is_where_the_score_test_just_rejects():
    for rate, count in ((0.8, 10), (0.5, 300), (0.02, 50)):
        for end in wilson(rate, count):
            assert abs(rate - end) == pytest.approx(1.959963984540054 * (end * (1 - end) / count) ** 0.5, rel=1e-12)
    assert wilson(0.0, 20)[0] == pytest.approx(0.0, abs=1e-12)


def test_binomial_by_counting():
    tosses = np.array(list(itertools.product((0, 1), repeat=9))).sum(1)
    for hits in range(10):
        assert binomial_p(hits, 9) == pytest.approx((np.abs(tosses - 4.5) >= abs(hits - 4.5)).mean(), rel=1e-12)
    assert binomial_p(1500, 3000) == 1
    assert binomial_p(0, 0) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def interval(cells):
    draws = Resampling.draw(*cells.shape[1:], 2000, np.random.default_rng(1)).totals(cells)
    rates = (draws[:, 0] + draws[:, 1] / 2) / draws.sum(1)
    return percentiles(rates), bootstrap_p(rates, 0.5)


def cells_of(wins):
    """(3, R, P) of wins (R, P) without ties."""
    return np.stack([wins, np.zeros_like(wins), 1 - wins])


def test_raters_who_all_say_the_same_are_one_rater():
    rng = np.random.default_rng(0)
    one = (rng.random(100) < 0.6).astype(float)
    low, high = interval(cells_of(np.tile(one, (10, 1))))[0]
    alone = wilson(one.mean(), 100)
    assert high - low == pytest.approx(alone[1] - alone[0], rel=0.1)


def test_prompts_that_tell_nothing_leave_the_raters():
    wins = np.repeat([[1.0], [0.0]] * 5, 100, axis=1)  # ten raters of fixed mind, 100 prompts
    low, high = interval(cells_of(wins))[0]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10**0.5, rel=0.1)


def test_interval_covers_and_p_belongs_to_it():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(60):
        taste, prompt = 0.1 * rng.standard_normal((8, 1)), 0.2 * rng.standard_normal((1, 40))
        wins = (rng.random((8, 40)) < 0.5 + taste + prompt).astype(float)
        (low, high), p = interval(cells_of(wins))
        covered += low <= 0.5 <= high
        assert (p >= 0.05) == (low <= 0.5 <= high) or abs(p - 0.05) < 0.005
    assert covered >= 53  # of 60; 57 are expected


def test_alpha_is_that_of_krippendorffs_package():
    krippendorff = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(3)
    for raters, units, missing in ((2, 12, 0.0), (5, 40, 0.3), (10, 300, 0.05)):
        values = np.clip(np.round(rng.normal(rng.normal(size=units), 1, (raters, units))), -1, 1)
        values[rng.random(values.shape) < missing] = np.nan
        expected = krippendorff.alpha(reliability_data=values, level_of_measurement="ordinal")
        assert ordinal_alpha(values) == pytest.approx(expected, abs=1e-12)


def test_alpha_that_cannot_be_told():
    assert ordinal_alpha(np.array([[1.0, 0.0, -1.0]])) is None
    assert ordinal_alpha(np.ones((3, 4))) is None
    assert ordinal_alpha(np.full((2, 2), np.nan)) is None
    assert ordinal_alpha(np.array([[1.0, 0.0, -1.0]] * 2)) == 1


def test_two_systems_have_a_closed_form():
    wins, ties = np.array([[0, 60], [15, 0]]), np.array([[0, 20], [20, 0]])
    strengths, nu = davidson(wins, ties)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(60 / 15), rel=1e-9)
    assert nu == pytest.approx(20 / (60 * 15) ** 0.5, rel=1e-9)


def test_strengths_solve_the_likelihood_equations():
    rng = np.random.default_rng(4)
    wins, ties = rng.integers(1, 40, (5, 5)), np.triu(rng.integers(0, 20, (5, 5)), 1)
    np.fill_diagonal(wins, 0)
    ties = ties + ties.T
    strengths, nu = davidson(wins, ties)
    p = np.exp(strengths)
    draw = nu * np.sqrt(np.outer(p, p))
    total = p[:, None] + p[None, :] + draw
    played = wins + wins.T + ties
    expected_points = (played * (p[:, None] + draw / 2) / total).sum(1) - played.diagonal()
    np.testing.assert_allclose(expected_points, (wins + ties / 2).sum(1), rtol=1e-9)
    np.testing.assert_allclose((played * draw / total).sum() / 2, ties.sum() / 2, rtol=1e-9)
    assert strengths.sum() == pytest.approx(0, abs=1e-12)


def test_strengths_without_ties_are_those_of_choix():
    choix = pytest.importorskip("choix")
    wins = np.random.default_rng(5).integers(1, 30, (4, 4))
    np.fill_diagonal(wins, 0)
    expected = choix.opt_pairwise(4, [(i, j) for i in range(4) for j in range(4) for _ in range(wins[i, j])], tol=1e-9)
    strengths, nu = davidson(wins, np.zeros((4, 4)))
    np.testing.assert_allclose(strengths, expected - expected.mean(), atol=1e-5)
    assert nu == 0


def test_strengths_that_are_infinite():
    never_lost = np.array([[0, 5, 5], [0, 0, 3], [0, 2, 0]])
    assert davidson(never_lost, np.zeros((3, 3))) is None
    assert davidson(np.zeros((3, 3)), np.ones((3, 3))) is None
    assert davidson(never_lost, 1 - np.eye(3)) is not None
