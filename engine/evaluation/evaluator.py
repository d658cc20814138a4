"""Evaluates base and tuned model on held-out prompts: same noise, deterministic DDIM, scores of judge and examiner.

Its scores never train anything: the prompts are held out and the examiner is independent of the judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.training import Config
from ..data.embeddings import Embeddings
from ..methods.online import OnlineModels
from ..models.conditioning import Conditioning
from ..runtime.ranks import Ranks, gather_rows, rank_slice

Examine = Callable[[Tensor, list[str]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores (N,) of all ranks' prompts by name, and the images (P, 3, H, W) of the first P prompts; on the CPU."""

    scores: dict[str, Tensor]
    images: Tensor


class Evaluator:
    """Samples and scores the held-out prompts at each call, with the policy as it is at that moment."""

    def __init__(
        self,
        models: OnlineModels,
        examine: Examine | None,
        embeddings: Embeddings,
        prompts: list[str],
        config: Config,
        ranks: Ranks,
    ):
        """Takes the held-out prompts, the same on every rank and in `embeddings`; each rank samples some of them."""
        self.policy, self.diffusion, self.judge = models.policy, models.diffusion, models.judge
        self.examine, self.embeddings, self.ranks = examine, embeddings, ranks
        self.config, self.text_kv = config.evaluate, config.rollout.text_kv
        self.schedule = self.diffusion.schedule(self.config.num_steps, eta=0.0, guidance=self.config.guidance)
        self.rows = rank_slice(len(prompts), ranks)
        self.all_prompts, self.prompts = prompts, prompts[self.rows]
        self.pictures = min(self.config.pictures, len(self.prompts))

    @torch.no_grad()
    def __call__(self, name: str) -> Evaluation:
        """Returns the scores of one image per prompt. Noise belongs to a prompt's number, whatever the batch or ranks.

        name: what is evaluated, for the terminal.
        """
        rng = torch.Generator(self.diffusion.device).manual_seed(self.config.seed)
        noise = self.schedule.prior((len(self.all_prompts), *self.policy.latent_shape), rng)[self.rows]
        scores: dict[str, list[Tensor]] = {}
        images = []
        starts = range(0, len(self.prompts), self.config.batch)
        if self.ranks.first:
            print(f"evaluating the {name} on {len(self.all_prompts)} held-out prompts", flush=True)
        bar = tqdm(
            total=len(starts) * self.schedule.num_steps,
            unit="step",
            leave=False,
            disable=None if self.ranks.first else True,  # None: where stderr is no terminal
        )
        for start in starts:
            prompts = self.prompts[start : start + self.config.batch]
            cond = self.embeddings[prompts]
            with self.policy.sampling(cond, self.text_kv) as sampling_cond:
                batch = self._sample(noise[start : start + len(prompts)], sampling_cond, bar)
            for name, values in self._score(batch, prompts, cond).items():
                scores.setdefault(name, []).append(values)
            images.append(batch[: max(0, self.pictures - start)].cpu())
        bar.close()
        gathered = {name: gather_rows(torch.cat(values).float(), self.ranks).cpu() for name, values in scores.items()}
        return Evaluation(gathered, torch.cat(images)[: self.pictures])

    def _sample(self, x: Tensor, cond: Conditioning, bar: tqdm) -> Tensor:
        """Returns images (N, 3, H, W) in [-1, 1] from noise (N, C, h, w); the bar moves at each step."""
        for i in range(self.schedule.num_steps):
            eps = self.policy.eps(x, self.schedule.timesteps(i, len(x)), cond, self.schedule.guided)
            x = self.schedule.mean(x, eps, i)
            bar.update()
        return self.diffusion.decode(x).float().clamp(-1, 1)

    def _score(self, images: Tensor, prompts: list[str], cond: Conditioning) -> dict[str, Tensor]:
        examined = self.examine(images, prompts) if self.examine else {}
        return {**examined, "judge": self.judge.score_images(images.unsqueeze(0), cond.judge, t=0)[0]}
