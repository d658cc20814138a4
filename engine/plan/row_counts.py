"""How many rows an iteration puts through each network, counted by running it: rollout, balance and update themselves.

They run on stand-ins: latents of one number, a policy that notes the rows it is given and computes nothing, a judge
that is sure of every pair. So nothing of the order of things is written down twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config.training import Config
from ..judge.candidates import Candidates
from ..methods.spo.pairs import balance
from ..methods.spo.rollout import Rollout
from ..methods.spo.update import Learner
from ..models.conditioning import Conditioning
from ..runtime.ranks import Ranks
from ..schedules.schedule import Schedule

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Tally:
    """Of one iteration of one process, whose pairs are all kept.

    rows: by (stage, call), how many rows went through; most: the largest number in one call. Calls are `unet`, a guided
    forward of the policy while sampling, `alone`, one that has one half alone, `train`, one with the backward pass
    after it, and `reference`, all in rows of the UNet, where a guided latent is two; `decode` in latents and `judge` in
    images. made: pairs of the rollout; sides: latents x_t of each, 2 where winner and loser may have their own; pairs:
    those trained on, however often; micro_batches: of all passes.
    """

    prompts: int
    rows: Counter = field(default_factory=Counter)
    most: Counter = field(default_factory=Counter)
    made: int = 0
    sides: int = 1
    pairs: int = 0
    micro_batches: int = 0

    def of(self, call: str, stage: str | None = None) -> int:
        """Rows of a call, of one stage or of all."""
        return sum(rows for (s, c), rows in self.rows.items() if c == call and stage in (None, s))


def tally(config: Config, schedule: Schedule) -> Tally:
    """Runs one iteration of a recipe; schedule: its rollout's, on the CPU."""
    notes = _Notes(config)
    prompts = config.rollout.prompts
    cond = Conditioning(torch.zeros(prompts, 1, 1), torch.zeros(1, 1, 1), torch.zeros(prompts))
    rng = torch.Generator().manual_seed(0)
    made = Rollout(notes, notes, notes, schedule, config.rollout, notes.clock)(cond, rng).pairs
    learner = Learner(notes, schedule, config.optim)
    notes.stage = "update"
    micro_batches = trained = 0
    for batch in learner.batches(balance(made, prompts, ALONE, rng), cond, rng):
        learner.loss(batch)
        micro_batches += 1
        trained += len(batch)
    pairs = trained // config.optim.passes
    return Tally(prompts, notes.rows, notes.most, len(made), len(made.x_t), pairs, micro_batches)


class _Notes:
    """Policy, decoder and judge in one, none of which does anything but note what it is given."""

    latent_shape = (1, 1, 1)

    def __init__(self, config: Config):
        self.multiple = config.optim.micro_batch if config.model.compile else 1
        self.rows, self.most = Counter(), Counter()
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
            call = "unet" if guided else "alone"
        self._note(call, halves * rows)
        return torch.zeros(halves, *x.shape, requires_grad=call == "train")

    def decode(self, latents: Tensor) -> Tensor:
        self._note("decode", latents[..., 0, 0, 0].numel())
        return latents

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Scores (K, B) so far apart that no threshold takes a pair for unsure."""
        k, prompts = candidates.images.shape[:2]
        self._note("judge", k * prompts)
        return 1e3 * torch.arange(k, dtype=torch.float32).unsqueeze(1).expand(k, prompts)

    def _note(self, call: str, rows: int) -> None:
        self.rows[self.stage, call] += rows
        self.most[call] = max(self.most[call], rows)
