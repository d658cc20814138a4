"""strop.engine.pairs: what belongs to one pair stays together through cat, shuffle and split."""

from dataclasses import replace

import pytest
import torch

from strop.engine.pairs import PreferencePairs


def numbered(first, count, shared=True):
    """Pairs that carry their number: in x_t, in x_prev (negative for the loser), in step and prompt."""
    number = torch.arange(first, first + count)
    rows = number.float().view(1, count, 1, 1, 1)
    x_t = rows if shared else torch.cat([rows, -rows])
    return PreferencePairs(x_t=x_t + 0.25, x_prev=torch.cat([rows, -rows]) + 0.5, step=number, prompt=10 * number)


def check(pairs, numbers, shared=True):
    number = torch.tensor(numbers, dtype=torch.int64)
    signed = torch.stack([number, -number]).float()
    assert len(pairs) == len(numbers)
    assert torch.equal(pairs.step, number)
    assert torch.equal(pairs.prompt, 10 * number)
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
