"""What a training method is: all that the loop of loop.py asks of one."""

from __future__ import annotations

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


class Method(Protocol[Rows, Batch]):
    """Collects rows and says what there is to learn from them.

    stage: what collecting is called by the clock. columns: all that it reports. rngs: the generators that it draws
    from, which checkpoints keep. trainable: what it trains.
    """

    stage: str
    columns: Sequence[Column]
    rngs: Mapping[str, torch.Generator]
    trainable: Trainable

    def learning_rate(self, iteration: int) -> float:
        """Of the optimizer steps of an iteration, counted from 0."""

    def collect(self, iteration: int) -> tuple[Rows, Measured]:
        """This rank's rows of an iteration (a rollout, or rows of a data set), and what there is to say of them."""

    def batches(self, rows: Rows) -> Iterator[Batch]:
        """Micro-batches to learn from, as many on every rank; each is asked for after the step of the one before."""

    def loss(self, batch: Batch) -> tuple[Tensor, Measured]:
        """The mean loss of a micro-batch, with gradients, and its stats, which are means over the batch."""

    def measure(self, done: int) -> Measured:
        """What is measured on held-out data after `done` iterations; empty where nothing is due."""
