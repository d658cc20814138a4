"""The processes of a run: the rank of each, their number, and the exchange of rows between them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from ..errors import UserError, one_line, short
from ..rows import Rows

R = TypeVar("R", bound=Rows)
T = TypeVar("T")
MOST_PROCESSES = 100_000
TIMEOUT = 600  # seconds that ranks wait for each other, unless a recipe says otherwise
MARGIN = timedelta(seconds=10)  # after which an exchange fails: a rank that is gone has been named by then


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process among `size` processes, and its device. store: where they met, None for one process."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(device: str, timeout: float = TIMEOUT) -> Ranks:
    """Joins the processes that `deepspeed` or `torchrun` started: NCCL on GPUs, gloo on CPUs; alone otherwise.

    device is "auto", "cpu" or "cuda". timeout: the longest wait for another rank, in seconds. Raises UserError when a
    GPU was asked for and there is none, and when the processes do not find each other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: found cuda, but PyTorch sees no GPU; use auto or cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size, local = _of_environment(torch.cuda.device_count() if kind == "cuda" else None)
    if size == 1:
        return Ranks(0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
    os.environ["DS_ACCELERATOR"] = kind
    import deepspeed

    if kind == "cuda":
        torch.cuda.set_device(local)
    ranks = _meet(torch.device(kind, local) if kind == "cuda" else torch.device(kind), timedelta(seconds=timeout))
    # An op that no training calls, for whose sake DeepSpeed would wait for a compiler and for a lock file.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)  # takes the process group that is there
    return ranks


def _meet(device: torch.device, timeout: timedelta) -> Ranks:
    """Finds the other processes at MASTER_ADDR:MASTER_PORT and joins them to torch.distributed's process group."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=timeout + MARGIN,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        told = ", ".join(f"{name}={os.environ.get(name, 'not set')}" for name in names)
        raise UserError(
            f"the processes of the run did not find each other ({told}): {one_line(error)}; start as many as "
            "WORLD_SIZE says, on several machines with GLOO_SOCKET_IFNAME set as docs/several_machines.md has it"
        ) from None
    return Ranks(rank, size, device, PrefixStore("watch", store))


def _of_environment(gpus: int | None) -> tuple[int, int]:
    """Checks WORLD_SIZE, RANK and LOCAL_RANK, which a launcher sets all three: (processes, rank on this machine).

    gpus: how many there are here, None on a CPU. Raises UserError for what no launcher sets.
    """
    mend = "start with deepspeed or torchrun, which set it, or unset WORLD_SIZE, RANK and LOCAL_RANK for one process"

    def number(name: str, default: int, beyond: int) -> int:
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < beyond):
            raise UserError(f"{name}: found {short(text)}, expected a whole number below {beyond}; {mend}")
        return int(text)

    if "WORLD_SIZE" not in os.environ and os.environ.get("RANK", "0") != "0":
        raise UserError(f"WORLD_SIZE: found none, but RANK is {short(os.environ['RANK'])}; {mend}")
    size = number("WORLD_SIZE", 1, MOST_PROCESSES)
    if size == 0:
        raise UserError(f"WORLD_SIZE: found 0, expected a number from 1; {mend}")
    if size == 1:
        number("RANK", 0, 1)
        return 1, 0
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise UserError(f"{missing[0]}: found none, but WORLD_SIZE is {size}; {mend}")
    number("RANK", 0, size)
    return size, number("LOCAL_RANK", 0, size if gpus is None else gpus)


def on_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Calls the action on the first rank; every rank returns its result, or raises its UserError."""
    outcome: list = [None, None]  # result, error
    if ranks.first:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if ranks.size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def on_every(ranks: Ranks, action: Callable[[], object]) -> None:
    """Calls the action on every rank and waits for all; if it raises a UserError on one, every rank raises that."""
    mine, errors = None, [None] * ranks.size
    try:
        action()
    except UserError as error:
        mine = str(error)
    if ranks.size > 1:
        dist.all_gather_object(errors, mine)
    if error := mine or next(filter(None, errors), None):
        raise UserError(error)


def rank_slice(count: int, ranks: Ranks) -> slice:
    """Returns which of `count` rows are this rank's: contiguous, in rank order, empty only if count < ranks.size."""
    return slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)


def gather(rows: R, ranks: Ranks) -> R:
    """Returns all ranks' rows, in rank order, on every rank. How many each has may differ, and be 0."""
    if ranks.size == 1:
        return rows
    counts: list[int] = []
    return rows.map(lambda value, axis: _gather(value.movedim(axis, 0), counts, ranks).movedim(0, axis))


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Does as `gather` with one tensor: (N_r, ...) -> (sum of N_r, ...)."""
    return rows if ranks.size == 1 else _gather(rows, [], ranks)


def _gather(rows: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """Gathers a tensor's rows. counts: how many each rank has; an empty list is filled in, by one more exchange."""
    if not counts:
        count = torch.tensor([len(rows)], device=rows.device)
        by_rank = [torch.zeros_like(count) for _ in range(ranks.size)]
        dist.all_gather(by_rank, count)
        counts += torch.cat(by_rank).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
