"""The rollout: fork k branches from one noisy latent, look ahead, judge, keep winner and loser, go on from one branch.

Policy, diffusion, judge and schedule come as arguments; this file knows the order of things and nothing else. The judge
sees decoded predictions; one that scores noisy latents would pick before `look_ahead` and leave the rest as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ...schedules.ddim import DDIMSchedule
from ...schedules.draws import Replay, integers
from .pairs import PreferencePairs, is_sure


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
    rng: torch.Generator | Replay,
    clock: Callable[[str], AbstractContextManager] = nullcontext,
) -> Rollout:
    """One trajectory per prompt of `cond`; config is the section `rollout`.

    The steps of config.t_range are cut into segments. A segment forks k branches from one latent, lets each walk on
    alone to the segment's end, and judges what it is going to be there. The forward that scores the branches is the one
    that gives eps for the next segment, so k branches cost one fused UNet forward a step. Draws from rng: the prior,
    then per step the noise, and after each judgement the choice of the next state. Steps before a segment that none
    judges are walked on one branch; those after the last one are not walked.
    """
    guided, text_alone = schedule.guidance != 1, config.look_ahead == "text"
    cuts = judged_segments(schedule, config)
    shared = all(len(cut) == 1 for cut in cuts)
    pairs, sure, scores = [], [], []
    kept = torch.zeros(schedule.num_steps, device=schedule.device)
    x = schedule.prior((len(cond), *policy.latent_shape), rng)  # (B, C, H, W)
    at, eps = 0, None
    for cut in cuts:
        with clock("rollout/trunk"):
            eps = complete(policy, schedule, x, eps, at, cond, guided)
            x, eps = walk(policy, schedule, x, eps, range(at, cut.start), cond, guided, rng)
        states = [x.unsqueeze(0), schedule.branch(x, eps, cut.start, config.k, rng)]  # (1, B, ...), (K, B, C, H, W)
        with clock("rollout/branches"):
            walked, before = walk_on(policy, schedule, states[-1], eps.unsqueeze(1), cut[1:], cond, guided, rng)
            states += walked
            before = before if text_alone else None
            eps_k, x0_hat = look_ahead(policy, schedule, states[-1], cut.stop, cond, guided, before)
        with clock("rollout/decode"):
            images = diffusion.decode(x0_hat)  # (K, B, 3, H, W)
        with clock("rollout/judge"):
            scores.append(judge.score(images, cond.judge, schedule.t[cut.stop]))  # (K, B)
        chosen = choose(scores[-1], config.pair, rng)  # (2, B)
        for i, earlier, later in zip(cut, states, states[1:], strict=False):
            earlier = earlier if shared else earlier.expand_as(later)
            pairs.append(PreferencePairs.of_step(earlier, later, chosen, i))
            sure.append(is_sure(scores[-1], chosen, config.threshold))
            kept[i] = sure[-1].sum()
        at = cut.stop
        if cut != cuts[-1]:
            x, eps = go_on(states[-1], eps_k, scores[-1], config.next_state, rng)
    pairs = PreferencePairs.cat(pairs)[torch.cat(sure).nonzero().flatten()]
    return Rollout(pairs, kept, torch.stack(scores).mean())


def judged_segments(schedule: DDIMSchedule, config) -> list[range]:
    """The segments that branches fork in, judged and trained on; config is the section `rollout`."""
    steps = schedule.steps_within(*config.t_range)
    return segments(steps, config.inner_steps, config.merge_last)[:: config.judge_every]


def forking_steps(schedule: DDIMSchedule, config) -> set[int]:
    """The steps at which branches fork: winner and loser share the latent there. config is the section `rollout`."""
    return {cut.start for cut in judged_segments(schedule, config)}


def check_steps(config, schedule: DDIMSchedule) -> None:
    """Raises UserError where t_range holds no step, or fewer segments than judge_every passes over.

    config is the section `rollout`.
    """
    steps = schedule.steps_within(*config.t_range)
    if not steps:
        raise UserError(
            f"rollout.t_range: found {list(config.t_range)}, expected a range with at least one of the "
            f"{config.num_steps} timesteps {', '.join(map(str, schedule.t[:-1]))}"
        )
    count = len(segments(steps, config.inner_steps, config.merge_last))
    if config.judge_every > count:
        raise UserError(
            f"rollout.judge_every: found {config.judge_every}, expected at most {count}, the number of segments in "
            "rollout.t_range"
        )


def segments(steps: range, length: int, merge_last: bool) -> list[range]:
    """`steps` cut into runs of `length`, the last of which may be shorter.

    merge_last: a last run of a single step is joined to the one before, as in the published sampler of longer
    runs, which never judges at the last step of a trajectory. A run of one step each is SPO, longer ones are MSPO.
    """
    starts = list(steps[::length])
    if merge_last and len(starts) > 1 and starts[-1] == steps[-1]:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], steps.stop], strict=True)]


def complete(policy, schedule: DDIMSchedule, x: Tensor, eps: Tensor | None, step: int, cond, guided: bool) -> Tensor:
    """eps (G, B, C, H, W) of x (B, C, H, W) at `step`, of which is known: nothing, the half with the prompt, or all."""
    t = schedule.timesteps(step, len(x))
    if eps is None:
        return policy.eps(x, t, cond, guided)
    if guided and len(eps) == 1:
        return torch.cat([policy.eps(x, t, cond.unprompted(), False), eps])
    return eps


def walk(
    policy, schedule: DDIMSchedule, x: Tensor, eps: Tensor, steps: range, cond, guided: bool, rng
) -> tuple[Tensor, Tensor]:
    """One branch through `steps`, plain stochastic DDIM: x (B, C, H, W) and its eps (G, B, C, H, W) after them."""
    for i in steps:
        x = schedule.branch(x, eps, i, k=1, rng=rng)[0]
        eps = policy.eps(x, schedule.timesteps(i + 1, len(x)), cond, guided)
    return x, eps


def walk_on(
    policy, schedule: DDIMSchedule, branches: Tensor, eps: Tensor, steps: range, cond, guided: bool, rng
) -> tuple[list[Tensor], Tensor]:
    """Each branch (K, B, C, H, W) alone through `steps`: its states after each of them, and eps before the last.

    eps (G, 1, B, C, H, W) is that of the latent they forked from, and comes back where there are no steps.
    """
    k, rows = branches.shape[:2]
    states = []
    flat = branches.flatten(0, 1)  # (K*B, C, H, W)
    for i in steps:
        eps = policy.eps(flat, schedule.timesteps(i, k * rows), cond.repeat(k), guided)
        flat = schedule.branch(flat, eps, i, k=1, rng=rng)[0]
        eps = eps.unflatten(1, (k, rows))
        states.append(flat.unflatten(0, (k, rows)))
    return states, eps


def look_ahead(
    policy, schedule: DDIMSchedule, branches: Tensor, step: int, cond, guided: bool, before: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """What each branch (K, B, C, H, W), now at `step`, will become: (eps (G, K, B, C, H, W), x0_hat (K, B, C, H, W)).

    before (2, K or 1, B, C, H, W): eps of the step before. Where it is given, only the half with the prompt is run, G
    is 1, and x0_hat takes the difference of the two halves from there. After the last step the branches are clean
    already: (None, branches).
    """
    if step == schedule.num_steps:
        return None, branches
    k, rows = branches.shape[:2]
    flat = branches.flatten(0, 1)  # (K*B, C, H, W)
    eps = policy.eps(flat, schedule.timesteps(step, k * rows), cond.repeat(k), guided and before is None)
    halves = eps
    if before is not None:
        without = eps.unflatten(1, (k, rows)) - (before[1:] - before[:1])
        halves = torch.cat([without.flatten(1, 2), eps])
    x0_hat = schedule.x0_hat(flat, halves, step)
    return eps.unflatten(1, (k, rows)), x0_hat.unflatten(0, (k, rows))


def choose(scores: Tensor, pair: str, rng: torch.Generator | Replay) -> Tensor:
    """Which branches are winner and loser: (2, B). scores (K, B).

    pair "best_worst"; or "random": two different ones, drawn, of which the better is the winner.
    """
    if pair == "best_worst":
        return torch.stack([scores.argmax(0), scores.argmin(0)])
    k, rows = scores.shape
    one = integers(k, rows, rng, scores.device)
    other = (one + 1 + integers(k - 1, rows, rng, scores.device)) % k
    two = torch.stack([one, other])  # (2, B)
    first, second = scores.gather(0, two)
    return torch.where(first >= second, two, two.flip(0))


def go_on(
    branches: Tensor, eps: Tensor, scores: Tensor, next_state: str, rng: torch.Generator | Replay
) -> tuple[Tensor, Tensor]:
    """The branch of each prompt that the trajectory follows, and its eps: a random one, the winner or the loser.

    branches (K, B, C, H, W), eps (G, K, B, C, H, W), scores (K, B) -> (B, C, H, W), (G, B, C, H, W). The published rule
    is a random branch, uniformly over all k, winner and loser among them.
    """
    if next_state == "random":
        return pick_random(branches, eps, rng)
    return follow(branches, eps, scores.argmax(0) if next_state == "winner" else scores.argmin(0))


def pick_random(branches: Tensor, eps: Tensor, rng: torch.Generator | Replay) -> tuple[Tensor, Tensor]:
    """One branch per prompt, uniformly: branches (K, B, C, H, W), eps (G, K, B, C, H, W) -> (B, ...), (G, B, ...)."""
    k, rows = branches.shape[:2]
    return follow(branches, eps, integers(k, rows, rng, branches.device))


def follow(branches: Tensor, eps: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Branch `choice` (B,) of each prompt: branches (K, B, C, H, W), eps (G, K, B, ...) -> (B, ...), (G, B, ...)."""
    each = torch.arange(branches.shape[1], device=branches.device)
    return branches[choice, each], eps[:, choice, each]
