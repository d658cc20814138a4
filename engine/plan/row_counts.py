"""Counts the rows that an iteration puts through each network, by running rollout, balance and update themselves.

They run on stand-ins: latents of one number, a policy that counts its rows and computes nothing, and a
judge that is sure of every pair. The order of an iteration is thus written down once, where it is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.methods.spo import SPOConfig
from ..judge.candidates import Candidates
from ..methods.spo.pairs import balance
from ..methods.spo.rollout import Rollout
from ..methods.spo.update import Learner
from ..models.conditioning import Conditioning
from ..runtime.ranks import Ranks
from ..schedules.schedule import Schedule

ONE_PROCESS = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Counts of one iteration of one process, where the judge is sure of every pair.

    rows: by (stage, call), how many rows went through. largest: by call, the most rows in one of them. The calls of the
    UNet, in its rows, of which a guided latent has two: `guided` and `unguided`, forwards of the rollout; `train`,
    forwards that a backward pass follows; `reference`. `decode` counts latents, `judge` images. rollout_pairs: pairs of
    the rollout. x_t_per_pair: 2 where winner and loser may have different latents x_t. trained_pairs: different pairs
    that are trained on. micro_batches: of all passes.
    """

    prompts: int
    rows: Counter = field(default_factory=Counter)
    largest: Counter = field(default_factory=Counter)
    rollout_pairs: int = 0
    x_t_per_pair: int = 1
    trained_pairs: int = 0
    micro_batches: int = 0

    def total(self, call: str, stage: str | None = None) -> int:
        """Returns the rows of a call, in one stage or in all."""
        return sum(rows for (s, c), rows in self.rows.items() if c == call and stage in (None, s))


def count_rows(config: SPOConfig, schedule: Schedule) -> RowCounts:
    """Runs one iteration of a recipe on stand-ins and returns its counts. schedule: the rollout's, on the CPU."""
    counter = _CountingModels(config)
    prompts = config.rollout.prompts
    cond = Conditioning(torch.zeros(prompts, 1, 1), torch.zeros(1, 1, 1), torch.zeros(prompts))
    rng = torch.Generator().manual_seed(0)
    pairs = Rollout(counter, counter, counter, schedule, config.rollout, counter.clock)(cond, rng).pairs
    learner = Learner(counter, schedule, config.optim)
    counter.stage = "update"
    micro_batches = trained = 0
    for batch in learner.batches(balance(pairs, prompts, ONE_PROCESS, rng), cond, rng):
        learner.loss(batch)
        micro_batches += 1
        trained += len(batch)
    trained_pairs = trained // config.optim.passes
    rows, largest = counter.rows, counter.largest
    return RowCounts(prompts, rows, largest, len(pairs), len(pairs.x_t), trained_pairs, micro_batches)


class _CountingModels:
    """Stands in for policy, decoder and judge, and only counts their rows."""

    latent_shape = (1, 1, 1)

    def __init__(self, config: SPOConfig):
        self.multiple = config.optim.micro_batch if config.model.compile else 1
        self.rows, self.largest = Counter(), Counter()
        self.stage, self.is_reference = "", False

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        outer, self.stage = self.stage, stage
        yield
        self.stage = outer

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.is_reference = True
        with torch.no_grad():
            yield
        self.is_reference = False

    def eps(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool = True) -> Tensor:
        halves, rows = 2 if guided else 1, len(x)
        if self.is_reference or torch.is_grad_enabled():
            call = "reference" if self.is_reference else "train"
            rows += -rows % self.multiple
        else:
            call = "guided" if guided else "unguided"
        self._count(call, halves * rows)
        return torch.zeros(halves, *x.shape, requires_grad=call == "train")

    def decode(self, latents: Tensor) -> Tensor:
        self._count("decode", latents[..., 0, 0, 0].numel())
        return latents

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Returns scores (K, B) so far apart that the judge is sure at any threshold."""
        k, prompts = candidates.images.shape[:2]
        self._count("judge", k * prompts)
        return 1e3 * torch.arange(k, dtype=torch.float32).unsqueeze(1).expand(k, prompts)

    def _count(self, call: str, rows: int) -> None:
        self.rows[self.stage, call] += rows
        self.largest[call] = max(self.largest[call], rows)
