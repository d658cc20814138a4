"""Rows: tensors that belong together row by row, each with its rows on an axis of its own.

Preference pairs, embeddings of prompts and the rows of every method are frozen dataclasses of this kind. How rows
travel between processes is in runtime/ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


def rows(axis: int | None = 0, **options: Any) -> Any:
    """Declares a field of a Rows by the axis on which its tensor has the rows; None where one tensor serves all rows.

    options: as for dataclasses.field; a field with default=None may be absent.
    """
    return field(metadata={"axis": axis}, **options)


class Rows:
    """Base of a dataclass whose fields are tensors declared by `rows`."""

    __slots__ = ()

    def __len__(self) -> int:
        """Returns the number of rows."""
        value, axis = next(iter(self._by_row().values()))
        return value.shape[axis]

    def __getitem__(self: R, chosen: Tensor | slice) -> R:
        """Returns the rows that an index tensor, a mask or a slice names."""
        return self.map(lambda value, axis: value[(*(slice(None),) * axis, chosen)])

    def map(self: R, function: Callable[[Tensor, int], Tensor]) -> R:
        """Returns a copy with function(tensor, axis) in place of each tensor that has rows."""
        return replace(self, **{name: function(value, axis) for name, (value, axis) in self._by_row().items()})

    @classmethod
    def cat(cls: type[R], parts: Sequence[R]) -> R:
        """Joins parts with the same fields; a tensor that serves all rows is taken from the first part."""
        joined = {
            name: torch.cat([getattr(part, name) for part in parts], dim=axis)
            for name, (_, axis) in parts[0]._by_row().items()
        }
        return replace(parts[0], **joined)

    def repeat(self: R, k: int) -> R:
        """Returns k copies, one after the other: row j * N + i is row i."""
        return self.map(lambda value, axis: value.repeat(*(1,) * axis, k, *(1,) * (value.ndim - axis - 1)))

    def shuffle(self: R, rng: torch.Generator) -> R:
        """Returns the rows in an order drawn from rng, on the device where the rows are."""
        value, _ = next(iter(self._by_row().values()))
        return self[torch.randperm(len(self), generator=rng, device=value.device)]

    def split(self: R, size: int) -> Iterator[R]:
        """Yields `size` rows at a time in order; the last part may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self: R, target: torch.device | torch.dtype, non_blocking: bool = False) -> R:
        """Returns a copy on another device, or with the floating-point tensors in another type."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if isinstance(target, torch.dtype):
            tensors = {name: value for name, value in tensors.items() if value.is_floating_point()}
        return replace(self, **{name: value.to(target, non_blocking=non_blocking) for name, value in tensors.items()})

    def _by_row(self) -> dict[str, tuple[Tensor, int]]:
        """Returns the tensors that have rows, with their axis, by field."""
        tensors = ((f.name, getattr(self, f.name), f.metadata["axis"]) for f in fields(self))
        return {name: (value, axis) for name, value, axis in tensors if value is not None and axis is not None}
