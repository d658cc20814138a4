"""The protocol of a training method: all that the loop of loop.py calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..runtime.checkpoint import Trainable
from ..runtime.columns import Column
from ..runtime.metrics import Value

Rows = TypeVar("Rows")
Batch = TypeVar("Batch", bound=Sized)
Measured = Mapping[str, Value | tuple[Value, Value]]  # by the names of columns; a pair is (mean, its weight)


class Monitor(Protocol):
    """A monitor evaluates a run while it trains. stopped: whether the run is to end after this iteration."""

    columns: Sequence[Column]
    stopped: bool

    def measure(self, done: int) -> Measured:
        """Returns measurements after `done` iterations; {} where none are due. A collective call."""

    def replay(self, records: Sequence[dict]) -> None:
        """Takes up the measurements of a resumed run from its records."""


class Method(Protocol[Rows, Batch]):
    """A method collects rows and computes a loss from them.

    stage: the clock's name for collecting. columns: all that the method reports. rngs: the generators that it draws
    from, whose states are in checkpoints. trainable: what it trains.
    """

    stage: str
    columns: Sequence[Column]
    rngs: Mapping[str, torch.Generator]
    trainable: Trainable

    def learning_rate(self, iteration: int) -> float:
        """Returns the learning rate of an iteration's optimizer steps; iterations are counted from 0."""

    def collect(self, iteration: int) -> tuple[Rows, Measured]:
        """Returns this rank's rows of an iteration (a rollout, or rows of a data set) and their measurements."""

    def batches(self, rows: Rows) -> Iterator[Batch]:
        """Yields micro-batches, as many on every rank; the loop asks for each after the step of the one before."""

    def loss(self, batch: Batch) -> tuple[Tensor, Measured]:
        """Returns the mean loss of a micro-batch, with gradients, and its stats, which are means over the batch."""

    def measure(self, done: int) -> Measured:
        """Returns measurements on held-out data after `done` iterations; {} where none is due.

        By default it measures nothing, because base and tuned model are evaluated before and after the loop.
        """
        return {}


def finite_mean(values: Tensor) -> Tensor:
    """Returns the mean () of the values that are finite, whose number the host need not know."""
    return values.where(values.isfinite(), math.nan).nanmean()
