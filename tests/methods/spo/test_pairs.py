"""methods/spo/pairs: which pairs are made of judged branches, and which of them count. Rows: test_rows.py."""

import math

import pytest
import torch

from strop.engine.methods.spo.pairs import PreferencePairs, is_sure
from strop.engine.methods.spo.rollout import choose


@pytest.mark.parametrize("threshold", [0.3, 0.4])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_choices_are_the_published_ones(golden, k, threshold):
    case3 = golden("case3_compare")
    scores = case3[f"k{k}/scores"]
    branches = torch.arange(k * 6.0).view(k, 6, 1, 1, 1)  # branch j of prompt i holds 6 j + i
    x_t = -torch.arange(6.0).view(6, 1, 1, 1)
    chosen = choose(scores, "best_worst", torch.Generator())
    pairs, sure = PreferencePairs.of_step(x_t.unsqueeze(0), branches, chosen, 7), is_sure(scores, chosen, threshold)
    indices = case3[f"k{k}/thr{threshold}/indices"]
    assert torch.equal(pairs.x_prev.flatten(1), 6.0 * indices + torch.arange(6))
    assert torch.equal(pairs.x_t, x_t.unsqueeze(0))
    assert pairs.step.tolist() == [7] * 6
    assert pairs.prompt.tolist() == [0, 1, 2, 3, 4, 5]
    assert pairs.shared.all()
    assert torch.equal(sure, case3[f"k{k}/thr{threshold}/valid"])


def test_branches_that_have_left_the_fork_have_an_x_t_each():
    chosen = torch.tensor([[2, 0], [1, 2]])
    branches = torch.arange(6.0).view(3, 2, 1, 1, 1)  # branch j of prompt i holds 2 j + i
    pairs = PreferencePairs.of_step(branches, branches + 10, chosen, 7)
    assert torch.equal(pairs.x_t.flatten(1), torch.tensor([[4.0, 1], [2, 5]]))
    assert torch.equal(pairs.x_prev, pairs.x_t + 10)
    assert not pairs.shared.any()
    fork = PreferencePairs.of_step(branches[:1], branches + 10, chosen, 6).apart()
    assert torch.equal(fork.x_t.flatten(1), torch.tensor([[0.0, 1], [0, 1]]))
    assert PreferencePairs.cat([fork, pairs]).shared.tolist() == [True, True, False, False]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_the_threshold_is_one_of_probability(threshold):
    """A pair just above the threshold is kept, one just below is not, and equal scores never."""
    edge = 2 * math.atanh(threshold)
    gap = torch.tensor([edge + 1e-5, edge - 1e-5, 0.0], dtype=torch.float64)
    scores = torch.stack([torch.full_like(gap, 20.0), 20.0 + gap])
    sure = is_sure(scores, choose(scores, "best_worst", torch.Generator()), threshold)
    difference = torch.softmax(torch.stack([scores.amax(0), scores.amin(0)]), 0).diff(dim=0).neg().squeeze(0)
    assert sure.tolist() == (difference > threshold).tolist()
    assert sure.tolist()[0]
    assert not sure.tolist()[2]
