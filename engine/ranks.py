"""The processes of a run: who am I, how many are we, and the few exchanges that SPO needs. One process needs none."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from strop.engine.errors import UserError
from strop.engine.pairs import PreferencePairs


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank of this process out of size, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(device: str) -> Ranks:
    """Joins the processes that `deepspeed` (or torchrun) started: NCCL on GPUs, gloo on CPUs; alone otherwise.

    device is "auto", "cpu" or "cuda". Raises UserError when a GPU was asked for and there is none, or when several
    processes on a CPU lack the C++ compiler with which DeepSpeed builds its communication op.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: found cuda, but PyTorch sees no GPU; use auto or cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size, rank, local = (
        int(os.environ.get(name, low)) for name, low in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if size == 1:
        return Ranks(0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
    if kind == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise UserError(
            f"{size} processes on a CPU need a C++ compiler, with which DeepSpeed builds its communication op; "
            "install g++ or start one process"
        )
    os.environ["DS_ACCELERATOR"] = kind
    import deepspeed

    if kind == "cuda":
        torch.cuda.set_device(local)
    deepspeed.init_distributed(dist_backend="nccl" if kind == "cuda" else "gloo", verbose=False)
    return Ranks(rank, size, torch.device(kind, local) if kind == "cuda" else torch.device(kind))


def share(count: int, ranks: Ranks) -> slice:
    """This rank's rows of `count`: contiguous, in rank order, none empty where there are as many rows as ranks."""
    return slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows (N_r, ...), in rank order, on every rank: (sum N_r, ...). The N_r may differ, and be 0."""
    if ranks.size == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(ranks.size)]
    dist.all_gather(counts, count)
    counts = torch.cat(counts).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def balance(pairs: PreferencePairs, prompts: int, ranks: Ranks, rng: torch.Generator) -> PreferencePairs:
    """Equal shares of all ranks' pairs, drawn at random; every rank then takes the same number of optimizer steps.

    prompts: of an iteration, on each rank; rng has the same state on every rank. The pairs returned name their prompt
    among those of all ranks, in rank order: every rank knows them and has their embeddings, so these do not travel. A
    remainder smaller than the number of ranks is dropped, as published, and so is everything when there are fewer pairs
    than ranks.
    """
    if ranks.size == 1:
        return pairs.shuffle(rng)
    everyone = PreferencePairs(
        x_t=gather_rows(pairs.x_t.transpose(0, 1), ranks).transpose(0, 1),
        x_prev=gather_rows(pairs.x_prev.transpose(0, 1), ranks).transpose(0, 1),
        step=gather_rows(pairs.step, ranks),
        prompt=gather_rows(pairs.prompt + ranks.rank * prompts, ranks),
    )
    each = len(everyone) // ranks.size
    return everyone.shuffle(rng)[slice(ranks.rank * each, (ranks.rank + 1) * each)]
