"""Measures a judge by what its choices become: both branches of a pair are finished, and the images scored.

From pools of siblings of the base model the judge picks winner and loser, as in a rollout. Both then walk on by
deterministic DDIM, so that nothing but the choice tells their images apart, and scorers say which of the two is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.spo.rollout import Rollout, choose, go_on
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import LatentDiffusion
from ..schedules.draws import Rng
from ..schedules.schedule import Schedule
from ..scorers.scorer import levels
from .evaluator import Score
from .intervals import wilson


@dataclass(frozen=True, slots=True)
class Pools:
    """Draws pools of siblings and finishes the pair that the rollout's judge picks.

    rollout: of the model whose siblings are judged; finish: its schedule without noise (eta 0); segments: those of the
    rollout's steps after which a pool is judged.
    """

    rollout: Rollout
    diffusion: LatentDiffusion
    finish: Schedule
    segments: Sequence[range]

    def __call__(self, cond: Conditioning, rng: Rng) -> Iterator[tuple[range, Tensor]]:
        """Yields each segment with the finished images of winner and loser (2, B, 3, H, W) of the B prompts of cond."""
        rollout, schedule = self.rollout, self.rollout.schedule
        x = schedule.prior((len(cond), *rollout.policy.latent_shape), rng)
        current, eps = 0, None
        for segment in self.segments:
            eps = rollout.complete_eps(x, eps, current, cond)
            x, eps = rollout.walk(x, eps, range(current, segment.start), cond, rng)
            branches = schedule.branch(x, eps, segment.start, rollout.config.k, rng)
            walked, before = rollout.walk_on(branches, eps.unsqueeze(1), segment[1:], cond, rng)
            candidates = rollout.candidates([branches, *walked][-1], segment.stop, cond, before)
            scores = rollout.judge.score(candidates, cond)
            chosen = choose(scores, "best_worst", rng)  # (2, B)
            pair = candidates.x[chosen, torch.arange(len(cond), device=x.device)]  # (2, B, C, h, w)
            yield segment, self.finished(pair, segment.stop, cond)
            x, eps = go_on(candidates, scores, "random", rng)
            current = segment.stop

    def finished(self, latents: Tensor, step: int, cond: Conditioning) -> Tensor:
        """Walks latents (K, B, C, h, w) from `step` to the end and decodes them: (K, B, 3, H, W), as a PNG has them."""
        x, cond = latents.flatten(0, 1), cond.repeat(len(latents))
        for i in range(step, self.finish.num_steps):
            eps = self.rollout.policy.eps(x, self.finish.timesteps(i, len(x)), cond, self.finish.guided)
            x = self.finish.mean(x, eps, i)
        images = levels(self.diffusion.decode(x).float().clamp(-1, 1)) / 127.5 - 1
        return images.unflatten(0, latents.shape[:2])


def spread(segments: Sequence[range], count: int) -> list[range]:
    """Returns at most `count` of the segments, evenly spread, the first and the last among them."""
    if count >= len(segments):
        return list(segments)
    return [segments[round(i * (len(segments) - 1) / max(count - 1, 1))] for i in range(count)]


def won(scores: Sequence[Score], images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Returns by score whether the first of two images (2, B, 3, H, W) is better, (B,): 1, 0, or .5 for a tie."""
    sides = [{name: value for score in scores for name, value in score(side, prompts).items()} for side in images]
    return {name: (1 + (first - sides[1][name]).sign().cpu()) / 2 for name, first in sides[0].items()}


def share(won: Tensor) -> dict:
    """Returns the share of pools (N,) in which the judge's winner ends above its loser, its 95% interval and N."""
    rate = won.double().mean().item()
    return {"share": rate, "ci95": wilson(rate, len(won)), "pools": len(won)}
