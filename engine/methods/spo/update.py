"""Computes the update: micro-batches of preference pairs, predictions of policy and reference, and the loss.

Winner and loser of a step at which the branches forked share their x_t, and a UNet sees each latent once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config.methods.spo import SPOOptimConfig
from ...models.conditioning import Conditioning
from ...models.policy import Policy
from ...schedules.schedule import Schedule
from .loss import spo_loss
from .pairs import PreferencePairs


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Pairs of one forward and backward pass, the first `shared` of which have one x_t for winner and loser.

    cond: of the iteration's prompts, of which pairs.prompt are rows.
    """

    pairs: PreferencePairs
    shared: int
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.pairs)


def micro_batches(pairs: PreferencePairs, size: int, cond: Conditioning) -> Iterator[MicroBatch]:
    """Yields `size` pairs at a time in order (the last time perhaps fewer), those that share x_t first.

    It waits for the device once, at the first micro-batch, and not at all where all pairs share x_t.
    """
    shared = pairs.shared.tolist() if len(pairs.x_t) == 2 else [True] * len(pairs)  # one wait an iteration
    for start in range(0, len(pairs), size):
        rows = sorted(range(start, min(start + size, len(pairs))), key=lambda row: not shared[row])
        batch = pairs[torch.tensor(rows).to(pairs.step.device, non_blocking=True)]
        yield MicroBatch(batch, sum(shared[row] for row in rows), cond)


@dataclass(frozen=True, slots=True)
class Learner:
    """Turns micro-batches into losses; config: the section `optim`."""

    policy: Policy
    schedule: Schedule
    config: SPOOptimConfig

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the SPO loss of a micro-batch, with gradients in the policy, and its stats, as `spo_loss` does."""
        pairs = batch.pairs
        eps = self.predict(batch)
        eps_ref = self.predict_reference(batch) if pairs.eps_ref is None else pairs.eps_ref
        log_ratio = self.schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, eps_ref, pairs.step)  # (2, N)
        return spo_loss(log_ratio, self.config.beta, self.config.clip)

    def batches(self, pairs: PreferencePairs, cond: Conditioning, rng: torch.Generator) -> Iterator[MicroBatch]:
        """Yields the micro-batches of all passes over a rollout's shuffled pairs; rng shuffles all but the first."""
        count = self.pair_count(len(pairs))
        pairs = pairs.surest(count) if self.config.keep_by == "surest" else pairs[:count]
        if self.config.passes > 1:
            pairs = self.with_reference(pairs, cond)
        for number in range(self.config.passes):
            pairs = pairs.shuffle(rng) if number else pairs
            yield from micro_batches(pairs, self.config.micro_batch, cond)

    def pair_count(self, available: int) -> int:
        """Returns how many of a rollout's pairs are trained on."""
        return math.ceil(self.config.keep_pairs * available)

    def batch_count(self, available: int) -> int:
        """Returns how many micro-batches `batches` yields for so many pairs."""
        return self.config.passes * math.ceil(self.pair_count(available) / self.config.micro_batch)

    def with_reference(self, pairs: PreferencePairs, cond: Conditioning) -> PreferencePairs:
        """Returns the pairs with the reference's predictions for them, in the order of their micro-batches.

        Passes over the same pairs then share it, because the reference does not learn. The first pass has the same bits
        as without.
        """
        batches = micro_batches(pairs, self.config.micro_batch, cond)
        parts = [replace(batch.pairs, eps_ref=self.predict_reference(batch)) for batch in batches]
        return PreferencePairs.cat(parts or [pairs])

    def predict_reference(self, batch: MicroBatch) -> Tensor:
        """Does as `predict` with the reference, without gradients."""
        with self.policy.reference():
            return self.predict(batch)

    def eps(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Computes the model output of N latents (2 or 1, N, C, H, W), with gradients where optim.guided has them."""
        guided = bool(self.config.guided) and self.schedule.guided
        if not guided or self.config.guided != "text" or not torch.is_grad_enabled():
            return self.policy.eps(x, t, cond, guided)
        with torch.no_grad():
            without = self.policy.eps(x, t, cond.unprompted(), guided=False)
        return torch.cat([without, self.policy.eps(x, t, cond, guided=False)])

    def predict(self, batch: MicroBatch) -> Tensor:
        """Returns the model output (G, R, N, C, H, W) at the x_t of a micro-batch.

        It runs one forward of N rows for the winners' x_t and N - shared more for those of losers with another x_t.
        """
        pairs, count = batch.pairs, len(batch)
        losers_x_t = pairs.x_t[1:, batch.shared :].flatten(0, 1)  # (N - shared, C, H, W), or none
        all_pairs = torch.arange(count, device=pairs.step.device)
        rows = torch.cat([all_pairs, all_pairs[count - len(losers_x_t) :]])
        t = self.schedule.timesteps(pairs.step[rows], len(rows))
        eps = self.eps(torch.cat([pairs.x_t[0], losers_x_t]), t, batch.cond[pairs.prompt[rows]])
        winners = eps[:, :count]  # (G, N, C, H, W)
        if len(pairs.x_t) == 1:
            return winners.unsqueeze(1)
        losers = torch.cat([winners[:, : batch.shared], eps[:, count:]], dim=1)
        return torch.stack([winners, losers], dim=1)
