"""Walks whole trajectories of stochastic DDIM, without branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..models.policy import Policy
from ..schedules.draws import Rng
from ..schedules.schedule import Schedule


class Step(NamedTuple):
    """A step of N trajectories from x_t to x_prev, both (N, C, H, W); eps (G, N, C, H, W): the policy's at x_t."""

    number: int
    x_t: Tensor
    eps: Tensor
    x_prev: Tensor


def walk(policy: Policy, schedule: Schedule, x: Tensor, cond: Conditioning, rng: Rng) -> Iterator[Step]:
    """Yields the steps of the trajectories that begin at x (N, C, H, W); it draws from rng the noise of each step.

    policy: sampling, with `cond` from its context.
    """
    for number in range(schedule.num_steps):
        with torch.no_grad():
            eps = policy.eps(x, schedule.timesteps(number, len(x)), cond, schedule.guided)
            x_prev = schedule.branch(x, eps, number, k=1, rng=rng)[0]
        yield Step(number, x, eps, x_prev)
        x = x_prev
