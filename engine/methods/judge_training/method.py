"""Trains a judge on preference pairs, as a method of the loop: a step-aware one (SPO, arXiv 2406.04314, section 3.2) or
a latent one (LPO, arXiv 2502.01051, section 4.1).

Every pair is shown at a random timestep, as candidates of that timestep look, and the judge learns to tell the
preferred image. An iteration is one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...config.judge_training import JudgeTrainingConfig
from ...data.pair_sets import PairSets, rank_batches
from ...judge.find import AnyJudge
from ...judge.heldout import accuracy, heldout_views
from ...judge.loss import example_weights, labels_of, preference_loss, preference_scores
from ...judge.model import TrainedJudge
from ...judge.views import Views
from ...models.conditioning import Conditioning
from ...runtime.ranks import gather_rows
from ...runtime.session import Session
from ...runtime.stop import ignore_signals
from ..protocol import Measured
from .columns import COLUMNS

EVALUATIONS = 5  # in the course of a run, the last one at its end; one more before it begins


@dataclass(frozen=True, slots=True)
class ShownPairs:
    """Pairs as the judge sees them: seen (2, N, ...), as its `compare` takes it; t (N,); pairs: the loader's batch."""

    pairs: dict
    seen: Tensor
    t: Tensor

    def __len__(self) -> int:
        return len(self.t)


class JudgeTraining:
    """This method shows pairs to the judge and trains it to order them as labelled."""

    stage = "show"
    columns = COLUMNS

    def __init__(
        self,
        config: JudgeTrainingConfig,
        judge: AnyJudge,
        views: Views,
        sets: PairSets,
        session: Session,
    ):
        """Computes what is shown of held-out pairs and the empty prompt's embedding once, and unfreezes the judge.

        decided: how many held-out pairs of all ranks are no ties.
        """
        self.config, self.judge, self.views, self.sets = config, judge, views, sets
        self.ranks, self.clock, self.counted = session.ranks, session.clock, session.live.counted
        self.diffusion = views.noiser.diffusion
        self.heldout = heldout_views(config, sets.heldout, views, self.ranks)
        self.empty_prompt = self.diffusion.encode([""]) if views.reads_text else None
        if sets.cached:
            self.diffusion.release_encoders()
        elif not views.reads_text:
            self.diffusion.release_text_encoders()
        judge.unfreeze()
        self.trainable = TrainedJudge(judge.network)
        decided = [sum((batch.labels[0] != batch.labels[1]).sum() for batch in self.heldout)]
        self.decided = int(gather_rows(torch.tensor(decided, device=self.ranks.device), self.ranks).sum())
        self.timesteps = self._timesteps()
        self.rngs = {"show": torch.Generator(self.ranks.device).manual_seed(config.run.seed + self.ranks.rank)}
        steps = config.optim.steps
        self.due = {round(steps * part / EVALUATIONS) for part in range(EVALUATIONS + 1)}
        self._loader: Iterator[dict] | None = None

    def learning_rate(self, iteration: int) -> float:
        """Returns the learning rate of an optimizer step: a warm-up, then a linear decay."""
        optim = self.config.optim
        return learning_rate(iteration, optim.steps, optim.warmup, optim.lr, optim.warmup_shape)

    def collect(self, iteration: int) -> tuple[Iterator[tuple[int, dict]], Measured]:
        """Returns an iterator of (number, pairs) over the iteration's batches, loaded when asked for, and counts."""
        optim, begin = self.config.optim, iteration * self.config.optim.accumulate
        if self._loader is None:
            total, seed = optim.steps * optim.accumulate, self.config.run.seed
            rows = islice(rank_batches(len(self.sets.train), optim.batch, total, seed, self.ranks), begin, None)
            workers = self.config.data.workers
            loader = DataLoader(self.sets.train, batch_sampler=rows, num_workers=workers, worker_init_fn=ignore_signals)
            self._loader = iter(loader)
        count, batches = optim.accumulate * optim.batch, range(begin, begin + optim.accumulate)
        return zip(batches, self._loader, strict=False), {"prompts": count, "pairs": count}

    def batches(self, rows: Iterator[tuple[int, dict]]) -> Iterator[ShownPairs]:
        """Yields the micro-batches of an iteration as the judge sees them."""
        count = self.config.optim.accumulate
        for _ in self.counted(range(count), count, "batch"):
            with self.clock("show"):
                number, pairs = next(rows)
                shown = self.show(pairs, clean_pairs(number, self.config))
            yield shown

    def loss(self, batch: ShownPairs) -> tuple[Tensor, Measured]:
        """Returns the loss by the published criterion, ties included, and its stats."""
        labels = labels_of(batch.pairs, self.ranks.device)
        counts = batch.pairs.get("num_examples", torch.ones(len(batch))).to(self.ranks.device)
        with self.autocast():
            text = self.judge.encode(batch.pairs["caption"])
            scores = preference_scores(self.judge, batch.seen, text, batch.t)
        loss, stats = preference_loss(scores.float(), labels, example_weights(counts, self.ranks))
        return loss, {"loss": stats["loss"], "accuracy": (stats["accuracy"], stats["decided"])}

    def measure(self, done: int) -> Measured:
        """Returns held-out accuracy by timestep, before the first step and EVALUATIONS times during the run."""
        if done not in self.due:
            return {}
        return {"heldout_accuracy": accuracy(self.judge, self.heldout, self.autocast, self.ranks.device)}

    def show(self, pairs: dict, clean: int) -> ShownPairs:
        """Returns what the judge sees of a batch.

        The first `clean` pairs of the (shuffled) batch are shown as they are, at t = 0; each other one at a timestep
        drawn uniformly, the same for both its images.
        """
        device, rng = self.ranks.device, self.rngs["show"]
        t = torch.randint(len(self.timesteps), (len(pairs["caption"]),), generator=rng, device=device)
        t = self.timesteps[t]
        t[:clean] = 0
        parts = [self.views.clean(images_of(pairs, slice(clean), device))] if clean else []
        if clean < len(t):
            mean, std, cond = self.encoded_pairs(pairs, slice(clean, None))
            parts.append(self.views.noised(mean, std, cond, t[clean:], rng))
        return ShownPairs(pairs, torch.cat(parts, dim=1), t)

    def encoded_pairs(self, pairs: dict, rows: slice) -> tuple[Tensor, Tensor, Conditioning | None]:
        """Returns the VAE's mean and std (2, N, C, h, w) and the conditioning of a batch's rows, cached or computed."""
        diffusion, device = self.diffusion, self.ranks.device
        if not self.sets.cached:
            posterior = diffusion.posterior(images_of(pairs, rows, device))
            return *posterior, diffusion.encode(pairs["caption"][rows]) if self.views.reads_text else None
        mean, std = (pairs[name][rows].transpose(0, 1).to(device, diffusion.vae.dtype) for name in ("mean", "std"))
        if not self.views.reads_text:
            return mean, std, None
        dtype = self.empty_prompt.text.dtype
        encoded = {name: pairs[name][rows].to(device, dtype) for name in ("text", "pooled") if name in pairs}
        return mean, std, replace(self.empty_prompt, **encoded)

    def _timesteps(self) -> Tensor:
        """Returns the timesteps at which pairs are shown: those of a sampler's steps, or all."""
        if self.config.optim.num_steps is None:
            return torch.arange(self.views.noiser.timesteps, device=self.ranks.device)
        *timesteps, _ = self.diffusion.schedule(self.config.optim.num_steps, 1.0, 1.0).t  # the last is the clean end
        return torch.tensor(timesteps, device=self.ranks.device)

    def autocast(self) -> torch.autocast:
        """Returns a context in which arithmetic is bfloat16 where model.dtype is a 16-bit type, as published."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.model.dtype != "float32")


def learning_rate(step: int, steps: int, warmup: int, peak: float, shape: str = "linear") -> float:
    """Returns the learning rate of a step, counted from 0: it rises over `warmup` steps to `peak`, then falls linearly.

    The fall would reach 0 at `steps`. shape is that of the rise: "linear", or "log", which is log(1 + step) /
    log(warmup) as in DeepSpeed's WarmupDecayLR.
    """
    if shape == "log" and step < warmup:
        return peak * math.log(1 + step) / math.log(max(2, warmup))
    return peak * min((step + 1) / max(1, warmup), (steps - step) / (steps - warmup))


def clean_pairs(batch_number: int, config: JudgeTrainingConfig) -> int:
    """Returns how many pairs of this batch are shown clean, so that optim.clean_share is met over the batches."""
    clean = config.optim.batch * config.optim.clean_share
    return int((batch_number + 1) * clean) - int(batch_number * clean)


def images_of(pairs: dict, rows: slice, device: torch.device) -> Tensor:
    """Returns the images (2, N, 3, H, W) of rows of a batch, in [-1, 1], on the device."""
    return torch.stack([pairs["image_0"][rows], pairs["image_1"][rows]]).to(device)
