"""The rollout: draw k branches from one noisy latent, look ahead, judge, keep best and worst, go on from a random one.

Policy, diffusion, judge and schedule come as arguments; this file knows the order of things and nothing else. The judge
sees decoded predictions; one that scores noisy latents would pick before `look_ahead` and leave the rest as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.engine.ddim import DDIMSchedule
from strop.engine.pairs import PreferencePairs
from strop.engine.preference import pick_pairs


@dataclass(frozen=True, slots=True)
class Rollout:
    """pairs: the kept ones, by step, then by prompt; kept (T,): how many per step; score: mean of all branches."""

    pairs: PreferencePairs
    kept: Tensor
    score: Tensor


@torch.no_grad()
def rollout(
    policy,
    diffusion,
    judge,
    schedule: DDIMSchedule,
    cond,
    config,
    rng: torch.Generator,
    clock: Callable[[str], AbstractContextManager],
) -> Rollout:
    """One trajectory per prompt of `cond`; config is the section `rollout`.

    The forward that scores the branches of step i is the forward that gives eps for step i + 1, so k branches cost one
    fused UNet forward a step. Draws from rng: the prior, then per step the branches' noise and the random choice.
    """
    pairs, sure, scores = [], [], []
    guided = schedule.guidance != 1
    x = schedule.prior((len(cond), *policy.latent_shape), rng)  # (B, C, H, W)
    with clock("rollout/unet"):
        for i in range(config.branch_from):
            eps = policy.eps(x, schedule.timesteps(i, len(x)), cond, guided)
            x = schedule.branch(x, eps, i, k=1, rng=rng)[0]
        eps = policy.eps(x, schedule.timesteps(config.branch_from, len(x)), cond, guided)
    for i in range(config.branch_from, schedule.num_steps):
        branches = schedule.branch(x, eps, i, config.k, rng)  # (K, B, C, H, W)
        with clock("rollout/unet"):
            eps_k, x0_hat = look_ahead(policy, schedule, branches, i + 1, cond, guided)
        with clock("rollout/decode"):
            images = diffusion.decode(x0_hat)  # (K, B, 3, H, W)
        with clock("rollout/judge"):
            scores.append(judge.score(images, cond.judge, schedule.t[i + 1]))  # (K, B)
        picked, keep = pick_pairs(x, branches, scores[-1], i, config.threshold)
        pairs.append(picked)
        sure.append(keep)
        if eps_k is not None:
            x, eps = pick_random(branches, eps_k, rng)
    kept = torch.zeros(schedule.num_steps, device=x.device)
    kept[config.branch_from :] = torch.stack(sure).sum(1).float()
    pairs = PreferencePairs.cat(pairs)
    return Rollout(pairs[torch.cat(sure).nonzero().flatten()], kept, torch.stack(scores).mean())


def look_ahead(
    policy, schedule: DDIMSchedule, branches: Tensor, step: int, cond, guided: bool
) -> tuple[Tensor | None, Tensor]:
    """What each branch (K, B, C, H, W), now at `step`, will become: (eps (G, K, B, C, H, W), x0_hat (K, B, C, H, W)).

    After the last step the branches are clean already: (None, branches).
    """
    if step == schedule.num_steps:
        return None, branches
    k, rows = branches.shape[:2]
    flat = branches.flatten(0, 1)  # (K*B, C, H, W)
    eps = policy.eps(flat, schedule.timesteps(step, k * rows), cond.repeat(k), guided)
    x0_hat = schedule.x0_hat(flat, eps, step)
    return eps.unflatten(1, (k, rows)), x0_hat.unflatten(0, (k, rows))


def pick_random(branches: Tensor, eps: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """One branch per prompt, uniformly: branches (K, B, C, H, W), eps (G, K, B, C, H, W) -> (B, ...), (G, B, ...)."""
    k, rows = branches.shape[:2]
    choice = torch.randint(0, k, (rows,), generator=rng, device=branches.device)
    each = torch.arange(rows, device=branches.device)
    return branches[choice, each], eps[:, choice, each]
