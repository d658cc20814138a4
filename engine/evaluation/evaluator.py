"""Evaluates base and tuned model on held-out prompts: same noise, deterministic DDIM, judge and scorers.

Its scores never train anything, and the prompts are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.training import Config
from ..data.embeddings import Embeddings
from ..methods.models import Models
from ..models.conditioning import Conditioning
from ..runtime.ranks import Ranks, gather_rows, rank_slice
from ..scorers.scorer import levels
from .drift import statistics
from .sampling import Sampler

Score = Callable[[Tensor, list[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measurements of N prompts over all ranks, on the CPU.

    scores: per measure (N,). statistics (N, ...) of the images, as drift.py compares them. images (P, 3, H, W) in
    [-1, 1] of the first P prompts.
    """

    scores: dict[str, Tensor]
    statistics: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.statistics)

    def first(self, count: int) -> Evaluation:
        """Returns the measurements of the first `count` prompts."""
        scores = {name: values[:count] for name, values in self.scores.items()}
        return Evaluation(scores, self.statistics[:count], self.images[:count])


class Evaluator:
    """An evaluator is made once per run; each call samples with whatever the policy is at that moment.

    Images are scored as a PNG would store them, in 8 bits. rewards: scores by what the policy is rewarded by, known
    from the first evaluation on.
    """

    def __init__(
        self,
        models: Models,
        scorers: Sequence[Score],
        embeddings: Embeddings,
        prompts: list[str],
        config: Config,
        ranks: Ranks,
    ):
        """Takes the held-out prompts, the same on every rank and in `embeddings`; each rank samples some of them."""
        self.policy, self.diffusion, self.judge = models.policy, models.diffusion, models.judge
        self.scorers, self.embeddings, self.ranks = scorers, embeddings, ranks
        self.config = config.evaluate
        self.rewarded_by, self.rewards = config.rewarded_by, set[str]()
        self.schedule = self.diffusion.schedule(self.config.num_steps, eta=0.0, guidance=self.config.guidance)
        self.sampler = Sampler(self.policy, self.diffusion, self.schedule, config.text_kv)
        self.all_prompts = prompts

    @torch.no_grad()
    def __call__(self, name: str, count: int | None = None) -> Evaluation:
        """Returns the scores of one image per prompt. Noise belongs to a prompt's number, whatever the batch or ranks.

        name: what is evaluated, for the terminal. count: how many prompts, from the first; None means all.
        """
        count = count or len(self.all_prompts)
        rows = rank_slice(count, self.ranks)
        prompts, pictures = self.all_prompts[rows], min(self.config.pictures, rows.stop - rows.start)
        noise = self.sampler.noise(len(self.all_prompts), self.config.seed)[rows]
        scores: dict[str, list[Tensor]] = {}
        measured, images = [], []
        starts = range(0, len(prompts), self.config.batch)
        if self.ranks.first:
            print(f"evaluating the {name} on {count} held-out prompts", flush=True)
        bar = tqdm(
            total=len(starts) * self.schedule.num_steps,
            unit="step",
            leave=False,
            disable=None if self.ranks.first else True,  # None: where stderr is no terminal
        )
        for start in starts:
            some = prompts[start : start + self.config.batch]
            cond = self.embeddings[some]
            batch = levels(self.sampler(noise[start : start + len(some)], cond, bar.update)) / 127.5 - 1
            for score, values in self._score(batch, some, cond).items():
                scores.setdefault(score, []).append(values)
            measured.append(statistics(batch))
            images.append(batch[: max(0, pictures - start)].cpu())
        bar.close()
        gathered = {name: gather_rows(torch.cat(values).float(), self.ranks).cpu() for name, values in scores.items()}
        return Evaluation(gathered, gather_rows(torch.cat(measured), self.ranks).cpu(), torch.cat(images)[:pictures])

    def _score(self, images: Tensor, prompts: list[str], cond: Conditioning) -> dict[str, Tensor]:
        scored = {}
        for spec, score in zip(self.config.scorers, self.scorers, strict=True):
            values = score(images, prompts)
            if self.rewarded_by and spec.partition("=")[0] == self.rewarded_by.partition("=")[0]:
                self.rewards |= values.keys()
            scored |= values
        return {**scored, "judge": self.judge.score_images(images.unsqueeze(0), cond.judge, t=0)[0]}
