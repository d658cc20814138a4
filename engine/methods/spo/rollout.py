"""Rolls out: forks k branches from one noisy latent, judges what they will become, pairs winner and loser, goes on.

Policy, decoder, judge and schedule are arguments; this file only says in which order they are called. Looking
ahead and decoding happen where a judge asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...config.methods.spo import RolloutConfig
from ...errors import UserError
from ...judge.candidates import Candidates, Judge
from ...models.conditioning import Conditioning
from ...schedules.draws import Rng, integers
from ...schedules.schedule import Schedule
from ..protocol import finite_mean
from .pairs import PreferencePairs, is_sure
from .thresholds import given_thresholds


class Predictor(Protocol):
    """The part of a policy that a rollout uses."""

    latent_shape: tuple[int, int, int]

    def eps(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool = True) -> Tensor: ...


class Decoder(Protocol):
    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The pairs above the threshold by step, then prompt; their number per step (T,).

    score: mean of the branches' scores that are finite; unscored: how many possible pairs have one that is not. gaps
    (S, B): score(winner) - score(loser) in each judged segment.
    """

    pairs: PreferencePairs
    pairs_per_step: Tensor
    score: Tensor
    unscored: Tensor
    gaps: Tensor


@dataclass(frozen=True, slots=True)
class Fork:
    """What came of the branches of one segment.

    states: x (1, B, C, H, W) before the fork, then the branches (K, B, C, H, W) after each step; scores (K, B) of the
    last; chosen (2, B): the branches of winner and loser.
    """

    segment: range
    states: list[Tensor]
    scores: Tensor
    chosen: Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """Walks one trajectory per prompt: `rollout(cond, rng)` returns an Outcome.

    The steps of config.t_range are cut into segments. A segment forks k branches from one latent, lets each walk on
    alone to the segment's end, and has them judged there. Where the judge looks ahead, the forward that it needs is the
    one that gives eps for the next segment, so k branches cost one fused UNet forward a step. It draws from rng the
    prior, then per step the noise, and after each judgement the choice of the next state. Steps in no segment are
    walked on one branch if a segment follows, and not at all after the last one.

    config: the section `rollout`; clock: times the parts of the stage `rollout`; counted: passes the segments on and
    shows which of how many it is; thresholds (T,): how sure the judge must be at each step, None as config says.
    """

    policy: Predictor
    decoder: Decoder
    judge: Judge
    schedule: Schedule
    config: RolloutConfig
    clock: Callable[[str], AbstractContextManager] = nullcontext
    counted: Callable[[Iterable[range], int, str], Iterable[range]] = lambda items, total, stage: items
    thresholds: Sequence[float] | None = None

    @torch.no_grad()
    def __call__(self, cond: Conditioning, rng: Rng) -> Outcome:
        judged = judged_segments(self.schedule, self.config)
        thresholds = self.thresholds or given_thresholds(self.config, self.schedule)
        apart = any(len(segment) > 1 for segment in judged)
        pairs, sure, scores, unscored, gaps = [], [], [], [], []
        pairs_per_step = torch.zeros(self.schedule.num_steps, device=self.schedule.device)
        for fork in self.forks(judged, cond, rng):
            segment, chosen = fork.segment, fork.chosen
            scores.append(fork.scores)
            both = fork.scores.gather(0, chosen)  # (2, B)
            gaps.append(both[0] - both[1])
            unscored.append(len(segment) * (~both.isfinite().all(0)).sum())
            for step, earlier, later in zip(segment, fork.states, fork.states[1:], strict=False):
                pair = PreferencePairs.of_step(earlier, later, chosen, step, gaps[-1])
                pairs.append(pair.apart() if apart else pair)
                sure.append(is_sure(fork.scores, chosen, thresholds[segment.start]))
                pairs_per_step[step] = sure[-1].sum()
        pairs = PreferencePairs.cat(pairs)[torch.cat(sure).nonzero().flatten()]
        scores = torch.stack(scores)
        return Outcome(pairs, pairs_per_step, finite_mean(scores), torch.stack(unscored).sum(), torch.stack(gaps))

    def forks(self, judged: Sequence[range], cond: Conditioning, rng: Rng) -> Iterator[Fork]:
        """Walks to each of the segments `judged`, forks and judges there, and goes on from there to the next."""
        x = self.schedule.prior((len(cond), *self.policy.latent_shape), rng)  # (B, C, H, W)
        current, eps = 0, None
        for segment in self.counted(judged, len(judged), "rollout"):
            with self.clock("rollout/trunk"):
                eps = self.complete_eps(x, eps, current, cond)
                x, eps = self.walk(x, eps, range(current, segment.start), cond, rng)
            branches = self.schedule.branch(x, eps, segment.start, self.config.k, rng)
            states = [x.unsqueeze(0), branches]  # (1 or K, B, C, H, W)
            with self.clock("rollout/branches"):
                walked, before = self.walk_on(states[-1], eps.unsqueeze(1), segment[1:], cond, rng)
            states += walked
            candidates = self.candidates(states[-1], segment.stop, cond, before)
            with self.clock("rollout/judge"):
                scores = self.judge.score(candidates, cond)  # (K, B)
            yield Fork(segment, states, scores, choose(scores, self.config.pair, rng))
            current = segment.stop
            if segment != judged[-1]:
                x, eps = go_on(candidates, scores, self.config.next_state, rng)

    def candidates(self, branches: Tensor, step: int, cond: Conditioning, before: Tensor) -> Candidates:
        """Returns the branches (K, B, C, H, W), now at `step`, as the judge takes them.

        before (2 or 1, K or 1, B, ...): eps one step ago.
        """

        def look_ahead(prompts: slice) -> tuple[Tensor | None, Tensor]:
            known = before[:, :, prompts] if self.config.look_ahead == "text" else None
            return self.look_ahead(branches[:, prompts], step, cond[prompts], known)

        decode = lambda x0_hat: self.decoder.decode(x0_hat)  # (K, B, 3, H, W); there may be no decoder to ask
        t, drawn_at = self.schedule.t[step], self.schedule.t[step - 1]
        return Candidates(branches, t, drawn_at, look_ahead, decode, self.clock)

    def complete_eps(self, x: Tensor, eps: Tensor | None, step: int, cond: Conditioning) -> Tensor:
        """Returns all of eps (G, B, C, H, W) at x (B, C, H, W); eps: None, its half with the prompt, or all of it."""
        t = self.schedule.timesteps(step, len(x))
        if eps is None:
            return self.policy.eps(x, t, cond, self.schedule.guided)
        if self.schedule.guided and len(eps) == 1:
            return torch.cat([self.policy.eps(x, t, cond.unprompted(), False), eps])
        return eps

    def walk(self, x: Tensor, eps: Tensor, steps: range, cond: Conditioning, rng: Rng) -> tuple[Tensor, Tensor]:
        """Walks one branch through `steps` by stochastic DDIM; returns x (B, C, H, W) and eps (G, B, C, H, W) there."""
        for i in steps:
            x = self.schedule.branch(x, eps, i, k=1, rng=rng)[0]
            eps = self.policy.eps(x, self.schedule.timesteps(i + 1, len(x)), cond, self.schedule.guided)
        return x, eps

    def walk_on(
        self, branches: Tensor, eps: Tensor, steps: range, cond: Conditioning, rng: Rng
    ) -> tuple[list[Tensor], Tensor]:
        """Walks each branch (K, B, C, H, W) alone; returns its states after each of `steps`, and eps before the last.

        eps (G, 1, B, C, H, W) is that of the latent they forked from, and comes back where there are no steps.
        """
        k, prompts = branches.shape[:2]
        states = []
        flat = branches.flatten(0, 1)  # (K*B, C, H, W)
        for i in steps:
            eps = self.policy.eps(flat, self.schedule.timesteps(i, len(flat)), cond.repeat(k), self.schedule.guided)
            flat = self.schedule.branch(flat, eps, i, k=1, rng=rng)[0]
            eps = eps.unflatten(1, (k, prompts))
            states.append(flat.unflatten(0, (k, prompts)))
        return states, eps

    def look_ahead(
        self, branches: Tensor, step: int, cond: Conditioning, before: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Predicts the clean latent of each branch (K, B, C, H, W) at `step`.

        Returns (eps (G, K, B, C, H, W), x0_hat (K, B, C, H, W)). before (2, K or 1, B, C, H, W): eps of the
        step before. With it, only the half with the prompt is run, G is 1, and x0_hat takes the
        difference of the two halves from there. After the last step the branches are clean already: (None, branches).
        """
        if step == self.schedule.num_steps:
            return None, branches
        k, prompts = branches.shape[:2]
        flat = branches.flatten(0, 1)  # (K*B, C, H, W)
        guided = self.schedule.guided and before is None
        eps = self.policy.eps(flat, self.schedule.timesteps(step, len(flat)), cond.repeat(k), guided)
        halves = eps
        if before is not None:
            without = eps.unflatten(1, (k, prompts)) - (before[1:] - before[:1])
            halves = torch.cat([without.flatten(1, 2), eps])
        x0_hat = self.schedule.x0_hat(flat, halves, step)
        return eps.unflatten(1, (k, prompts)), x0_hat.unflatten(0, (k, prompts))


def judged_segments(schedule: Schedule, config: RolloutConfig) -> list[range]:
    """Returns the segments in which branches fork, are judged and trained on."""
    steps = schedule.steps_within(*config.t_range)
    return segments(steps, config.inner_steps, config.merge_last)[:: config.judge_every]


def check_steps(config: RolloutConfig, schedule: Schedule) -> None:
    """Raises UserError where t_range holds no step, or fewer segments than judge_every passes over."""
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
    """Returns `steps` cut into runs of `length`, the last of which may be shorter.

    merge_last: a last run of a single step is joined to the one before, as in the published sampler of longer
    runs, which never judges at the last step of a trajectory. A run of one step each is SPO, longer ones are MSPO.
    """
    starts = list(steps[::length])
    if merge_last and len(starts) > 1 and starts[-1] == steps[-1]:
        starts.pop()
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], steps.stop], strict=True)]


def choose(scores: Tensor, pair: str, rng: Rng) -> Tensor:
    """Chooses the branches of winner and loser, (2, B), by scores (K, B).

    pair: "best_worst", or "random" for two different branches drawn from rng, of which the better is the winner.
    """
    if pair == "best_worst":
        return torch.stack([scores.argmax(0), scores.argmin(0)])
    k, prompts = scores.shape
    one = integers(k, prompts, rng, scores.device)
    other = (one + 1 + integers(k - 1, prompts, rng, scores.device)) % k
    two = torch.stack([one, other])  # (2, B)
    first, second = scores.gather(0, two)
    return torch.where(first >= second, two, two.flip(0))


def go_on(candidates: Candidates, scores: Tensor, next_state: str, rng: Rng) -> tuple[Tensor, Tensor | None]:
    """Returns the branch that each trajectory follows, (B, C, H, W), and its eps if known, (G, B, C, H, W).

    next_state: a random branch, which is the published rule (uniformly over all k, winner and loser among them), or the
    winner or the loser by scores (K, B).
    """
    k, prompts = scores.shape
    if next_state == "random":
        choice = integers(k, prompts, rng, scores.device)
    else:
        choice = scores.argmax(0) if next_state == "winner" else scores.argmin(0)
    row = torch.arange(prompts, device=scores.device)
    return candidates.x[choice, row], None if candidates.eps is None else candidates.eps[:, choice, row]
