"""Measures how often a judge in training orders held-out pairs as labelled, at several timesteps."""

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

TIMESTEPS = (0, 251, 501, 701, 951)  # of held-out accuracy; at 0 the images are clean


@dataclass(frozen=True, slots=True)
class HeldoutBatch:
    """A batch of held-out pairs with the judge's input at each of TIMESTEPS, on the CPU.

    pixels (T, 2, N, 3, S, S) float16, normalised; labels (2, N); captions N.
    """

    pixels: Tensor
    labels: Tensor
    captions: list[str]


@torch.no_grad()
def heldout_views(
    config: JudgeTrainingConfig, pairs: Dataset, denoiser: Denoiser, judge: StepAwarePreferenceModel, ranks: Ranks
) -> list[HeldoutBatch]:
    """Computes this rank's held-out batches once: base model and noise do not change during a run."""
    rng = torch.Generator(ranks.device).manual_seed(config.run.seed + ranks.rank)
    rank_pairs = Subset(pairs, range(ranks.rank, len(pairs), ranks.size))
    views = []
    for batch in DataLoader(rank_pairs, batch_size=config.optim.batch, num_workers=config.data.workers):
        images = torch.stack([batch["image_0"], batch["image_1"]]).to(ranks.device)  # (2, N, 3, H, W)
        cond, posterior = denoiser.diffusion.encode(batch["caption"]), denoiser.diffusion.posterior(images)
        pixels = []
        for timestep in TIMESTEPS:
            t = torch.full((len(cond),), timestep, device=ranks.device)
            shown = denoiser.show(*posterior, cond, t, rng) if timestep else images
            pixels.append(judge.pixels(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).half().cpu())
        views.append(HeldoutBatch(torch.stack(pixels), labels_of(batch, ranks.device), batch["caption"]))
    return views


@torch.no_grad()
def accuracy(
    judge: StepAwarePreferenceModel,
    views: list[HeldoutBatch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns the fraction of this rank's held-out pairs that the judge orders as labelled, and their number.

    Both are (T,), one value for each of TIMESTEPS. Ties are not counted.
    """
    right = torch.zeros(len(TIMESTEPS), dtype=torch.float64, device=device)
    decided = torch.zeros_like(right)
    for view in views:
        with autocast():
            text = judge.encode(view.captions)
            for i, timestep in enumerate(TIMESTEPS):
                t = torch.full((len(text),), timestep, device=device)
                scores = preference_scores(judge, view.pixels[i].to(device).float(), text, t)
                batch_right, batch_decided = agreement(scores.float(), view.labels)
                right[i] += batch_right
                decided[i] += batch_decided
    return right / decided.clamp(min=1), decided
