"""The update: micro-batches of preference pairs, what policy and reference say of them, one optimizer step each.

Winner and loser of a step at which the branches forked share their x_t, and a UNet sees each latent once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...config.training import OptimConfig
from ...models.conditioning import Conditioning
from ...models.policy import Policy
from ...runtime import optimizer as zero
from ...runtime.metrics import Metrics
from ...schedules.ddim import DDIMSchedule
from .loss import spo_loss
from .pairs import PreferencePairs


def micro_batches(pairs: PreferencePairs, size: int, forks: Collection[int]) -> Iterator[tuple[PreferencePairs, int]]:
    """`size` pairs at a time in order (the last time perhaps fewer), and how many of them share x_t: they come first.

    forks: the steps at which branches fork. Pairs with x_t (1, N, ...) share it all. One wait for the device, at the
    first micro-batch.
    """
    apart = [len(pairs.x_t) == 2 and step not in forks for step in pairs.step.tolist()]
    for start in range(0, len(pairs), size):
        rows = sorted(range(start, min(start + size, len(pairs))), key=lambda row: apart[row])
        batch = pairs[torch.tensor(rows).to(pairs.step.device, non_blocking=True)]
        yield batch, len(rows) - sum(apart[row] for row in rows)


def learn(
    pairs: PreferencePairs,
    forks: Collection[int],
    cond: Conditioning,
    policy: Policy,
    schedule: DDIMSchedule,
    optimizer: zero.LocalAdamW | zero.ZeroAdamW,
    config: OptimConfig,
    rng: torch.Generator,
    metrics: Metrics,
) -> None:
    """All passes over the shuffled pairs of a rollout; rng shuffles them anew for each after the first."""
    pairs = pairs[: math.ceil(config.keep_pairs * len(pairs))]
    if config.passes > 1:
        pairs = with_reference(pairs, forks, cond, policy, schedule, config)
    for again in range(config.passes):
        pairs = pairs.shuffle(rng) if again else pairs
        for batch, shared in micro_batches(pairs, config.micro_batch, forks):
            update(batch, shared, cond, policy, schedule, optimizer, config, metrics)


def with_reference(
    pairs: PreferencePairs,
    forks: Collection[int],
    cond: Conditioning,
    policy: Policy,
    schedule: DDIMSchedule,
    config: OptimConfig,
) -> PreferencePairs:
    """The pairs with what the reference predicts for them, in the order of their micro-batches.

    Passes over the same pairs then share it, because the reference does not learn. The first pass has the same bits
    as without.
    """
    guided = config.guided and schedule.guidance != 1
    parts = [pairs[:0]]
    with policy.reference():
        for batch, shared in micro_batches(pairs, config.micro_batch, forks):
            parts.append(replace(batch, eps_ref=predict(policy, batch, shared, schedule, cond, guided)))
    return PreferencePairs.cat(parts[1:] or parts)


def update(
    batch: PreferencePairs,
    shared: int,
    cond: Conditioning,
    policy: Policy,
    schedule: DDIMSchedule,
    optimizer: zero.LocalAdamW | zero.ZeroAdamW,
    config: OptimConfig,
    metrics: Metrics,
) -> None:
    """One micro-batch: policy and reference on its latents, the loss, its gradient, perhaps an optimizer step."""
    guided = config.guided and schedule.guidance != 1
    eps = predict(policy, batch, shared, schedule, cond, guided)
    eps_ref = batch.eps_ref
    if eps_ref is None:
        with policy.reference():
            eps_ref = predict(policy, batch, shared, schedule, cond, guided)
    log_ratio = schedule.log_ratio(batch.x_prev, batch.x_t, eps, eps_ref, batch.step)  # (2, N)
    loss, stats = spo_loss(log_ratio, config.beta, config.clip)
    optimizer.backward(loss)
    norm = optimizer.step()
    metrics.add_mean(len(batch), **stats)
    if norm is not None:
        metrics.add_mean(grad_norm=norm)


def predict(
    policy: Policy, batch: PreferencePairs, shared: int, schedule: DDIMSchedule, cond: Conditioning, guided: bool
) -> Tensor:
    """Model output (G, R, N, C, H, W) of a batch of pairs, the first `shared` of which have one x_t for both.

    One forward of N rows for the winners' x_t and N - shared more for those of losers that have their own.
    """
    rows = len(batch)
    others = batch.x_t[1:, shared:].flatten(0, 1)  # (N - shared, C, H, W), or none
    again = torch.arange(rows, device=batch.step.device)[rows - len(others) :]
    every = torch.cat([torch.arange(rows, device=again.device), again])
    t = schedule.timesteps(batch.step[every], len(every))
    eps = policy.eps(torch.cat([batch.x_t[0], others]), t, cond[batch.prompt[every]], guided)  # (G, N + others, ...)
    winners = eps[:, :rows]
    if len(batch.x_t) == 1:
        return winners.unsqueeze(1)
    return torch.stack([winners, torch.cat([winners[:, :shared], eps[:, rows:]], dim=1)], dim=1)
