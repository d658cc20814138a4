"""What the processes of a run send each other in an iteration, in bytes: gradients and parameters, and the
pairs that ranks.py's `balance` gathers.

Counted is what one process receives when exchanges go round in a ring, as NCCL's do: for an all-gather what the others
have, for an all-reduce twice that. Scalars (counts of pairs, norms) are left out.
"""

from __future__ import annotations

from ..config.training import Config
from .row_counts import Tally

FLOAT = 4  # LoRA, its gradients and latents are float32
INT, BOOL = 8, 1


def zero_bytes(config: Config, counted: Tally, lora: int, ranks: int) -> float:
    """ZeRO's per iteration: an all-reduce of the gradients, from stage 2 on for every micro-batch, and an all-gather of
    the parameters after every optimizer step. lora: how many numbers are trained."""
    others = (ranks - 1) / ranks * FLOAT * lora
    steps = counted.micro_batches / config.optim.accumulate
    reductions = counted.micro_batches if config.zero.stage == 2 else steps
    return others * (2 * reductions + steps)


def pair_bytes(counted: Tally, latent: int) -> float:
    """Of one preference pair; latent: numbers in one."""
    return (counted.sides + 2) * latent * FLOAT + 2 * INT + BOOL


def balance_bytes(counted: Tally, latent: int, ranks: int) -> float:
    """The balance of pairs, per iteration: every process receives all others' pairs and keeps its share."""
    return (ranks - 1) * counted.made * pair_bytes(counted, latent)
