"""Measures a judge by what its choices become: both branches of a pair are finished, and the images scored.

From pools of siblings of the base model the judge picks winner and loser, as in a rollout. Both then walk on by
deterministic DDIM, so that nothing but the choice tells their images apart, and scorers say which of the two is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.spo.rollout import Rollout
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import LatentDiffusion
from ..schedules.draws import Rng
from ..schedules.schedule import Schedule
from ..scorers.find import scores_by
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
        prompts = torch.arange(len(cond), device=self.finish.device)
        for fork in self.rollout.forks(self.segments, cond, rng):
            pair = fork.states[-1][fork.chosen, prompts]  # (2, B, C, h, w)
            yield fork.segment, self.finished(pair, fork.segment.stop, cond)

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


def won(scorers: Mapping[str, Score], images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Returns by score whether the first of two images (2, B, 3, H, W) is better, (B,): 1, 0, or .5 for a tie.

    scorers: by their specs in evaluate.scorers. Raises UserError for scores that cannot be used.
    """
    better = {}
    for spec, scorer in scorers.items():
        first, second = (scores_by(scorer, side, prompts, spec, "evaluate.scorers") for side in images)
        better |= {name: (1 + (torch.tensor(first[name]) - torch.tensor(second[name])).sign()) / 2 for name in first}
    return better


def share(won: Tensor) -> dict:
    """Returns the share of pools (N,) in which the judge's winner ends above its loser, its 95% interval and N."""
    rate = won.double().mean().item()
    return {"share": rate, "ci95": wilson(rate, len(won)), "pools": len(won)}
