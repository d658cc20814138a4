"""How often a judge in training orders held-out pairs as labelled, at each of some timesteps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..config.judge_training import JudgeTrainingConfig
from ..runtime.ranks import Ranks
from .denoiser import Denoiser
from .loss import agreement, labels_of, preference_scores
from .model import StepAwarePreferenceModel

TIMESTEPS = (0, 251, 501, 701, 951)  # where held-out accuracy is measured; at 0 the images are shown clean


@dataclass(frozen=True, slots=True)
class View:
    """A batch of held-out pairs as the judge is shown them at each of TIMESTEPS; kept on the CPU.

    pixels (T, 2, N, 3, S, S) float16, normalised; labels (2, N); captions N.
    """

    pixels: Tensor
    labels: Tensor
    captions: list[str]


@torch.no_grad()
def heldout_views(
    config: JudgeTrainingConfig, pairs: Dataset, denoiser: Denoiser, judge: StepAwarePreferenceModel, ranks: Ranks
) -> list[View]:
    """This rank's held-out pairs at TIMESTEPS. Base model and noise never change, so they are made once and kept."""
    rng = torch.Generator(ranks.device).manual_seed(config.run.seed + ranks.rank)
    mine = Subset(pairs, range(ranks.rank, len(pairs), ranks.size))
    views = []
    for batch in DataLoader(mine, batch_size=config.optim.batch, num_workers=config.data.workers):
        images = torch.stack([batch["image_0"], batch["image_1"]]).to(ranks.device)  # (2, N, 3, H, W)
        cond, posterior = denoiser.diffusion.encode(batch["caption"]), denoiser.posterior(images)
        seen = []
        for value in TIMESTEPS:
            t = torch.full((len(cond),), value, device=ranks.device)
            shown = denoiser.show(*posterior, cond, t, rng) if value else images
            seen.append(judge.pixels(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).half().cpu())
        views.append(View(torch.stack(seen), labels_of(batch, ranks.device), batch["caption"]))
    return views


@torch.no_grad()
def accuracy(
    judge: StepAwarePreferenceModel,
    views: list[View],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(share of this rank's held-out pairs that the judge orders as labelled, of how many), at each of TIMESTEPS: (T,).

    Ties are left out.
    """
    right = torch.zeros(len(TIMESTEPS), dtype=torch.float64, device=device)
    decided = torch.zeros_like(right)
    for view in views:
        with autocast():
            text = judge.encode(view.captions)
            for at, value in enumerate(TIMESTEPS):
                t = torch.full((len(text),), value, device=device)
                scores = preference_scores(judge, view.pixels[at].to(device).float(), text, t)
                right_here, decided_here = agreement(scores.float(), view.labels)
                right[at] += right_here
                decided[at] += decided_here
    return right / decided.clamp(min=1), decided
