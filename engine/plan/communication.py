"""Counts the bytes that the processes of a run receive from each other in an iteration: gradients, parameters, pairs.

The counts hold for exchanges that go round in a ring, as NCCL's do: in an all-gather a process receives the rows of the
others, in an all-reduce twice that. Scalars (numbers of pairs, norms) are left out.
"""

from __future__ import annotations

from ..config.training import Config
from .row_counts import RowCounts

FLOAT = 4  # bytes; the LoRA and its gradients are float32


def zero_bytes(config: Config, counts: RowCounts, lora: int, ranks: int) -> float:
    """Returns the bytes that ZeRO sends to one process in an iteration; `lora` numbers are trained.

    Gradients are all-reduced at every optimizer step, and the parameters gathered after it.
    """
    gather = (ranks - 1) / ranks * FLOAT * lora
    return gather * 3 * counts.micro_batches / config.accumulate


def balance_bytes(counts: RowCounts, latent: int, ranks: int) -> float:
    """Returns the bytes that a process receives when `balance` gathers all pairs; every process makes as many.

    latent: numbers of a latent. They are 0 where each rank learns from what it collected itself.
    """
    return (ranks - 1) * counts.collected_bytes(latent) if counts.exchanged else 0
