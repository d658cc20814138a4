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
from .find import AnyJudge
from .loss import agreement, labels_of, preference_scores
from .views import Views

TIMESTEPS = (0, 251, 501, 701, 951)  # of held-out accuracy; at 0 the images are clean


@dataclass(frozen=True, slots=True)
class HeldoutBatch:
    """A batch of held-out pairs with what the judge is shown at each of TIMESTEPS, on the CPU.

    shown (T, 2, N, ...) float16; labels (2, N); captions N.
    """

    shown: Tensor
    labels: Tensor
    captions: list[str]


@torch.no_grad()
def heldout_views(config: JudgeTrainingConfig, pairs: Dataset, views: Views, ranks: Ranks) -> list[HeldoutBatch]:
    """Computes this rank's held-out batches once: base model and noise do not change during a run."""
    rng = torch.Generator(ranks.device).manual_seed(config.run.seed + ranks.rank)
    rank_pairs = Subset(pairs, range(ranks.rank, len(pairs), ranks.size))
    batches = []
    for batch in DataLoader(rank_pairs, batch_size=config.optim.batch, num_workers=config.data.workers):
        images = torch.stack([batch["image_0"], batch["image_1"]]).to(ranks.device)  # (2, N, 3, H, W)
        cond = views.noiser.diffusion.encode(batch["caption"]) if views.reads_text else None
        posterior = views.noiser.diffusion.posterior(images)
        shown = torch.stack([views.scored(images, posterior, t, cond, rng).half().cpu() for t in TIMESTEPS])
        batches.append(HeldoutBatch(shown, labels_of(batch, ranks.device), batch["caption"]))
    return batches


@torch.no_grad()
def accuracy(
    judge: AnyJudge,
    batches: list[HeldoutBatch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns the fraction of this rank's held-out pairs that the judge orders as labelled, and their number.

    Both are (T,), one value for each of TIMESTEPS. Ties are not counted.
    """
    right = torch.zeros(len(TIMESTEPS), dtype=torch.float64, device=device)
    decided = torch.zeros_like(right)
    for batch in batches:
        with autocast():
            text = judge.encode(batch.captions)
            for i, timestep in enumerate(TIMESTEPS):
                t = torch.full((len(text),), timestep, device=device)
                scores = preference_scores(judge, batch.shown[i].to(device).float(), text, t)
                batch_right, batch_decided = agreement(scores.float(), batch.labels)
                right[i] += batch_right
                decided[i] += batch_decided
    return right / decided.clamp(min=1), decided
