"""strop.engine.methods.spo.pairs: what belongs to one pair stays together through cat, shuffle and split."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from strop.engine.methods.spo.pairs import PreferencePairs, is_sure
from strop.engine.methods.spo.rollout import choose


def numbered(first, count, shared=True):
    """Pairs that carry their number: in x_t, in x_prev (negative for the loser), in step, prompt and shared."""
    number = torch.arange(first, first + count)
    rows = number.float().view(1, count, 1, 1, 1)
    x_t = rows if shared else torch.cat([rows, -rows])
    x_prev = torch.cat([rows, -rows]) + 0.5
    return PreferencePairs(x_t + 0.25, x_prev, step=number, prompt=10 * number, shared=number % 3 == 0)


def check(pairs, numbers, shared=True):
    number = torch.tensor(numbers, dtype=torch.int64)
    signed = torch.stack([number, -number]).float()
    assert len(pairs) == len(numbers)
    assert torch.equal(pairs.step, number)
    assert torch.equal(pairs.prompt, 10 * number)
    assert torch.equal(pairs.shared, number % 3 == 0)
    assert torch.equal(pairs.x_prev, (signed + 0.5).view(2, -1, 1, 1, 1))
    assert torch.equal(pairs.x_t, (signed[:1] if shared else signed).add(0.25).view(1 if shared else 2, -1, 1, 1, 1))


def test_predictions_of_the_reference_stay_with_their_pairs():
    pairs = [replace(p, eps_ref=torch.stack([p.x_t, -p.x_t])) for p in (numbered(0, 3), numbered(3, 4))]
    mixed = PreferencePairs.cat(pairs).shuffle(torch.Generator().manual_seed(0))[:5]
    check(mixed, mixed.step.tolist())
    assert torch.equal(mixed.eps_ref, torch.stack([mixed.x_t, -mixed.x_t]))


@pytest.mark.parametrize("shared", [True, False], ids=["shared-x_t", "separate-x_t"])
@pytest.mark.parametrize(
    "rows, numbers",
    [
        (slice(1, 3), [1, 2]),
        (slice(0, 0), []),
        (torch.tensor([4, 0, 0]), [4, 0, 0]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
    ],
    ids=["slice", "nothing", "indices", "mask"],
)
def test_rows_are_taken_whole(rows, numbers, shared):
    check(numbered(0, 5, shared)[rows], numbers, shared)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-x_t", "separate-x_t"])
def test_cat_puts_one_after_the_other(shared):
    parts = [numbered(3, 2, shared), numbered(7, 0, shared), numbered(0, 1, shared)]
    check(PreferencePairs.cat(parts), [3, 4, 0], shared)


def test_shuffle_keeps_pairs_whole_and_loses_none():
    shuffled = numbered(0, 40).shuffle(torch.Generator().manual_seed(0))
    check(shuffled, shuffled.step.tolist())
    assert sorted(shuffled.step.tolist()) == list(range(40))
    assert shuffled.step.tolist() != list(range(40))


def test_shuffle_draws_from_its_generator_alone():
    torch.manual_seed(1)
    first = numbered(0, 40).shuffle(torch.Generator().manual_seed(5)).step.tolist()
    torch.manual_seed(2)
    assert numbered(0, 40).shuffle(torch.Generator().manual_seed(5)).step.tolist() == first
    assert numbered(0, 40).shuffle(torch.Generator().manual_seed(6)).step.tolist() != first


@pytest.mark.parametrize(
    "count, size, sizes",
    [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2]), (3, 1, [1, 1, 1]), (0, 4, [])],
)
def test_split_cuts_in_order(count, size, sizes):
    batches = list(numbered(0, count).split(size))
    assert [len(batch) for batch in batches] == sizes
    start = 0
    for batch in batches:
        check(batch, list(range(start, start + len(batch))))
        start += len(batch)


def test_pairs_cannot_be_changed():
    with pytest.raises(AttributeError):
        numbered(0, 1).step = torch.zeros(1)


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


def test_golden_choices_are_of_both_kinds(golden):
    """Otherwise the agreement above would say nothing about the threshold."""
    case3 = golden("case3_compare")
    for k, threshold in itertools.product((2, 4, 8), (0.3, 0.4)):
        assert case3[f"k{k}/thr{threshold}/indices"].shape == (2, 6)
    valid = torch.cat([case3[f"k{k}/thr{threshold}/valid"] for k in (2, 4, 8) for threshold in (0.3, 0.4)])
    assert valid.any()
    assert not valid.all()


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
