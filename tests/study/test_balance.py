"""Which comparisons a rater sees: sides are balanced exactly, repeats are exchanged and late, the seed decides."""

from collections import Counter

import pytest

from strop.engine.study.balance import DEGRADED, PAIR, REPEAT, SENTINEL, Design, plan


def surplus(items):
    """How much oftener each system stood on the left than on the right."""
    return Counter(item.left for item in items) - Counter(item.right for item in items), (
        Counter(item.right for item in items) - Counter(item.left for item in items)
    )


@pytest.mark.parametrize("systems", [2, 3, 4, 5])
@pytest.mark.parametrize("prompts", [1, 10, 61])
def test_sides_are_even_to_within_one(systems, prompts):
    for items in plan(Design(systems, prompts, "abc", seed=prompts, repeats=0.1)).values():
        pairs = [item for item in items if item.kind == PAIR]
        for shown in (pairs, [item for item in items if item.kind != SENTINEL]):
            assert all(count <= 1 for side in surplus(shown) for count in side.values())
        for two in {frozenset((item.left, item.right)) for item in pairs}:
            some = [item for item in pairs if {item.left, item.right} == two]
            assert len(some) == prompts
            assert all(count <= 1 for side in surplus(some) for count in side.values())
        intact = Counter(item.left != DEGRADED for item in items if item.kind == SENTINEL)
        assert abs(intact[True] - intact[False]) <= 1


def test_two_raters_see_a_pair_from_both_sides():
    first, second, _ = plan(Design(3, 7, "abc", seed=1)).values()
    sides = [{(i.prompt, i.left, i.right) for i in items if i.kind == PAIR} for items in (first, second)]
    assert sides[0] == {(prompt, right, left) for prompt, left, right in sides[1]}
    assert [i.prompt for i in first] != [i.prompt for i in second]


def test_repeats_are_exchanged_and_come_later():
    (items,) = plan(Design(2, 100, ["a"], seed=2, repeats=0.05, sentinels=0.03)).values()
    assert Counter(item.kind for item in items) == {PAIR: 100, REPEAT: 5, SENTINEL: 3}
    places = {item.token: place for place, item in enumerate(items)}
    assert len(places) == len(items)
    for item in items:
        if item.kind == REPEAT:
            first = items[places[item.of]]
            assert (first.kind, first.prompt, first.left, first.right) == (PAIR, item.prompt, item.right, item.left)
            assert places[item.token] - places[item.of] >= 20


def test_the_seed_decides():
    designs = [Design(2, 30, "ab", seed) for seed in (5, 5, 6)]
    assert plan(designs[0]) == plan(designs[1]) != plan(designs[2])
    assert Counter(item.kind for item in plan(Design(2, 30, "a", 5, repeats=0, sentinels=0))["a"]) == {PAIR: 30}
