"""rows: what belongs to one row stays together, on whichever axis each tensor has its rows."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.models.conditioning import Conditioning
from strop.engine.rows import Rows, rows


@dataclass(frozen=True, slots=True)
class Mixed(Rows):
    """One tensor for all rows first, so that nobody takes its length for theirs."""

    everyones: Tensor = rows(None)
    number: Tensor = rows()
    second: Tensor = rows(1)
    third: Tensor | None = rows(2, default=None)
    absent: Tensor | None = rows(default=None)


def mixed(*numbers, everyones=7.0):
    """Rows that carry their number in every tensor."""
    number = torch.tensor(numbers, dtype=torch.int64)
    second = torch.stack([number + 0.5, -number - 0.5])  # (2, N)
    return Mixed(torch.full((1, 3), everyones), number, second, second.view(1, 2, -1, 1) * 2)


def assert_holds(found, *numbers, everyones=7.0):
    expected = mixed(*numbers, everyones=everyones)
    assert len(found) == len(numbers)
    for name in ("everyones", "number", "second", "third"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.absent is None


@pytest.mark.parametrize(
    "chosen, numbers",
    [
        (slice(1, 3), [4, 5]),
        (slice(0, 0), []),
        (torch.tensor([2, 0, 0]), [5, 3, 3]),
        (torch.tensor([True, False, True]), [3, 5]),
    ],
    ids=["slice", "nothing", "indices", "mask"],
)
def test_rows_are_taken_whole(chosen, numbers):
    assert_holds(mixed(3, 4, 5)[chosen], *numbers)


def test_cat_puts_one_after_the_other_and_keeps_what_serves_all():
    assert_holds(Mixed.cat([mixed(3, 4), mixed(), mixed(0, everyones=9.0)]), 3, 4, 0)
    assert_holds(Mixed.cat([mixed(3, everyones=9.0)]), 3, everyones=9.0)


def test_repeated_rows_come_copy_by_copy():
    """Row j * N + i is row i, as branches (K, N, ...) are flattened."""
    assert_holds(mixed(3, 4).repeat(3), 3, 4, 3, 4, 3, 4)
    assert_holds(mixed(3, 4).repeat(1), 3, 4)
    assert_holds(mixed().repeat(3))


def test_shuffle_keeps_rows_together_and_draws_from_its_generator_alone():
    given = mixed(*range(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert_holds(given.shuffle(torch.Generator().manual_seed(5)), *order.tolist())
    assert order.tolist() != list(range(40))


@pytest.mark.parametrize("count, size, sizes", [(6, 3, [3, 3]), (7, 3, [3, 3, 1]), (2, 5, [2]), (0, 4, [])])
def test_split_cuts_in_order(count, size, sizes):
    parts = list(mixed(*range(count)).split(size))
    assert [len(part) for part in parts] == sizes
    for at, part in enumerate(parts):
        assert_holds(part, *range(at * size, at * size + len(part)))


def test_another_device_is_for_all_and_another_type_for_floating_point_alone():
    found = mixed(3, 4).to(torch.bfloat16).to(torch.device("meta"))
    tensors = {field.name: getattr(found, field.name) for field in fields(Mixed)[:4]}
    types = {name: tensor.dtype for name, tensor in tensors.items()}
    assert types == dict.fromkeys(("everyones", "second", "third"), torch.bfloat16) | {"number": torch.int64}
    assert all(tensor.is_meta for tensor in tensors.values())
    assert found.absent is None


def test_conditioning_has_the_empty_prompt_once_and_pairs_their_rows_where_they_say():
    cond = Conditioning(torch.rand(3, 2, 5), torch.rand(1, 2, 5), pooled=torch.rand(3, 4), null_pooled=torch.rand(1, 4))
    cond = replace(cond, time_ids=torch.rand(1, 6), row=torch.arange(3), judge=torch.rand(3, 7))
    chosen = cond[torch.tensor([2, 0])]
    for name in ("text", "judge", "pooled", "row"):
        assert torch.equal(getattr(chosen, name), getattr(cond, name)[[2, 0]]), name
    for name in ("null", "null_pooled", "time_ids"):
        assert getattr(chosen, name) is getattr(cond, name), name

    latents = torch.rand(2, 3, 4, 8, 8)
    number = torch.arange(3)
    pairs = PreferencePairs(latents[:1], latents, number, number + 5, number > 0, torch.stack([latents, -latents]))
    chosen = pairs[torch.tensor([2, 0])]
    assert torch.equal(chosen.x_t, latents[:1, [2, 0]])
    assert torch.equal(chosen.x_prev, latents[:, [2, 0]])
    assert torch.equal(chosen.eps_ref[1], -latents[:, [2, 0]])
    assert (chosen.step.tolist(), chosen.prompt.tolist(), chosen.shared.tolist()) == ([2, 0], [7, 5], [True, False])
