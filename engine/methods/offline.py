"""What methods share that learn from labelled pairs of images and sample nothing while they train.

Both images of a pair, the winner first, are noised to one timestep with one noise, and the UNet predicts it without
guidance, winners and losers in one forward. An iteration is one optimizer step. A method adds its loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config.offline import OfflineConfig
from ..data.embeddings import TrainingPrompts
from ..data.pair_scan import name_broken
from ..data.pair_sets import rank_batches
from ..judge.loss import labels_of
from ..models.conditioning import Conditioning
from ..runtime.columns import GRAD_NORM, PROMPTS, Column, Curve
from ..runtime.session import Session
from ..runtime.stop import ignore_signals
from .columns import PAIRS
from .models import Models
from .protocol import Measured, Method

LOSS = Column(
    "loss",
    heading="loss",
    form="{:.4f}",
    drawn=Curve("Loss", "healthy: falls slowly, under the noise of its timesteps"),
)
ERROR = Column(
    "error",
    heading="error",
    form="{:.4f}",
    drawn=Curve("Squared error of the winners' noise", "healthy: level, or falls slowly", from_zero=True),
)


def columns(*preferences: Column) -> tuple[Column, ...]:
    """Returns the columns of a method that reports these of its preferences."""
    return (PROMPTS, PAIRS, LOSS, ERROR, *preferences, GRAD_NORM)


@dataclass(frozen=True, slots=True)
class NoisedPairs:
    """N pairs at timesteps t (N,): x and what is to be predicted there, target, both (2, N, C, h, w), winner first.

    cond: of the N prompts, some of them emptied; its time_ids, where images are cropped, of the 2N images.
    """

    x: Tensor
    target: Tensor
    t: Tensor
    cond: Conditioning

    def __len__(self) -> int:
        return len(self.t)


class Offline(Method):
    """Loads pairs, noises them and lets the policy predict; a method adds its columns and its loss."""

    stage = "encode"

    def __init__(self, config: OfflineConfig, models: Models, prompts: TrainingPrompts, session: Session):
        """Checks and caches the pairs; with the cache, the encoders are not needed any more and go.

        prompts: none, because the pairs bring theirs. Raises UserError for pairs that cannot be used.
        """
        self.config, self.policy, self.diffusion = config, models.policy, models.diffusion
        self.ranks, self.clock, self.counted = session.ranks, session.clock, session.live.counted
        self.trainable, self.run_dir = models.trainable, session.dir
        self.data = models.pairs(config, session.ranks)
        self.empty = models.diffusion.encode([""])
        if self.data.cached:
            models.diffusion.release_encoders()
        self.rng = torch.Generator(self.ranks.device).manual_seed(config.run.seed + self.ranks.rank)
        self.rngs = {"pairs": self.rng}
        self._loader: Iterator[dict] | None = None

    def learning_rate(self, iteration: int) -> float:
        """Returns the learning rate of an optimizer step: a linear warm-up, then constant."""
        optim = self.config.optim
        return optim.lr * min(1.0, (iteration + 1) / max(1, optim.warmup))

    def collect(self, iteration: int) -> tuple[Iterator[dict], Measured]:
        """Returns an iterator over the iteration's batches of pairs, loaded when asked for, and counts."""
        optim, count = self.config.optim, self.config.pairs_per_iteration
        if self._loader is None:
            self.announce()
            begin, total = iteration * optim.accumulate, self.config.iterations * optim.accumulate
            dealt = rank_batches(len(self.data.pairs), optim.micro_batch, total, self.config.run.seed, self.ranks)
            rows, workers = islice(dealt, begin, None), self.config.data.workers
            loader = DataLoader(self.data.pairs, batch_sampler=rows, num_workers=workers, worker_init_fn=ignore_signals)
            self._loader = iter(loader)
        return islice(self._loader, optim.accumulate), {"prompts": count, "pairs": count}

    def announce(self) -> None:
        """Prints on the first rank how many pairs there are, and names those that are broken."""
        if self.ranks.first:
            pairs, ties, others = len(self.data.pairs), self.data.ties, self.data.left_out
            filtered = f", {self.data.filtered:,} by data.only" if self.config.data.only else ""
            print(f"{pairs:,} pairs, {ties:,} ties and {others:,} other rows left out{filtered}", flush=True)
            name_broken(self.data.broken, self.run_dir)

    def batches(self, rows: Iterator[dict]) -> Iterator[NoisedPairs]:
        """Yields the micro-batches of an iteration, noised."""
        count = self.config.optim.accumulate
        for _ in self.counted(range(count), count, "update"):
            with self.clock(self.stage):
                noised = self.noised(next(rows))
            yield noised

    def timesteps(self, count: int) -> Tensor:
        """Draws the timesteps of pairs, (count,) int64: all are as likely."""
        total = len(self.diffusion.scheduler.alphas_cumprod)
        return torch.randint(total, (count,), generator=self.rng, device=self.ranks.device)

    @torch.no_grad()
    def noised(self, pairs: dict) -> NoisedPairs:
        """Noises a batch of the loader.

        Drawn are, in this order, the timesteps, which prompts are emptied, which images are flipped, a latent of each
        image, and one noise for each pair.
        """
        count, device = len(pairs["caption"]), self.ranks.device
        t = self.timesteps(count)
        emptied = torch.rand(count, generator=self.rng, device=device) < self.config.drop_prompts
        mean, std = self.posterior(pairs, self.flips(count))
        latents = mean + std * torch.randn(mean.shape, generator=self.rng, device=device)
        latents = winner_first(latents, labels_of(pairs, device)) * self.diffusion.vae.config.scaling_factor
        noise = torch.randn(latents.shape[1:], generator=self.rng, device=device)
        both, scheduler = (latents, noise.expand_as(latents), t.repeat(2, 1)), self.diffusion.scheduler
        both = [part.flatten(0, 1) for part in both]  # 2N rows
        predicts_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(*both) if predicts_v else both[1]
        x, target = (rows.unflatten(0, (2, count)) for rows in (scheduler.add_noise(*both), target))
        return NoisedPairs(x, target, t, self.conditioning(pairs, emptied))

    def predict(self, batch: NoisedPairs) -> Tensor:
        """Returns what the policy predicts for winners and losers, (2, N, C, h, w) in float32, by one forward."""
        eps = self.policy.eps(batch.x.flatten(0, 1), batch.t.repeat(2), batch.cond.repeat(2), guided=False)
        return eps[0].unflatten(0, (2, len(batch)))

    def flips(self, count: int) -> Tensor | None:
        """Draws which images of the pairs are flipped, (2, count) bool in the order of the data; None for no image."""
        flip = self.config.data.flip
        if flip == "none":
            return None
        drawn = torch.rand(2 if flip == "independent" else 1, count, generator=self.rng, device=self.ranks.device)
        return (drawn < 0.5).expand(2, count)

    def posterior(self, pairs: dict, flips: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the VAE's mean and std (2, N, C, h, w) in float32, cached or computed; flips (2, N)."""
        device = self.ranks.device
        if self.data.cached:
            mean, std = (self._flipped(pairs, name, flips) for name in ("mean", "std"))
        else:
            images = torch.stack([pairs["image_0"], pairs["image_1"]]).to(device)  # (2, N, 3, H, W)
            if flips is not None:
                images = torch.where(flips[..., None, None, None], images.flip(-1), images)
            mean, std = self.diffusion.posterior(images)
        return mean.float(), std.float()

    def _flipped(self, pairs: dict, name: str, flips: Tensor | None) -> Tensor:
        """Returns a part (2, N, C, h, w) of the posteriors in the cache, of flipped images where flips says so."""
        plain = pairs[name].transpose(0, 1).to(self.ranks.device)
        if flips is None:
            return plain
        flipped = pairs[f"flipped_{name}"].transpose(0, 1).to(self.ranks.device)
        return torch.where(flips[..., None, None, None], flipped, plain)

    def conditioning(self, pairs: dict, emptied: Tensor) -> Conditioning:
        """Returns the conditioning of a batch, cached or computed, with an empty text for the prompts emptied (N,)."""
        if self.data.cached:
            dtype, names = self.empty.text.dtype, ("text", "pooled")
            encoded = {name: pairs[name].to(self.ranks.device, dtype) for name in names if name in pairs}
            cond = replace(self.empty, **encoded)
        else:
            cond = self.diffusion.encode(pairs["caption"])
        changed = {"text": torch.where(emptied[:, None, None], self.empty.text, cond.text)}
        if cond.pooled is not None:
            changed["pooled"] = torch.where(emptied[:, None], self.empty.pooled, cond.pooled)
        if "frame" in pairs:
            changed["time_ids"] = self.time_ids(pairs).to(cond.text.dtype)
        return replace(cond, **changed)

    def time_ids(self, pairs: dict) -> Tensor:
        """Returns original size, crop and target size of the images of a batch, (2N, 6), winners first."""
        device = self.ranks.device
        frames = winner_first(pairs["frame"].to(device).transpose(0, 1), labels_of(pairs, device)).flatten(0, 1)
        target = torch.tensor(self.diffusion.image_size, device=device).expand(len(frames), 2)
        return torch.cat([frames, target], dim=1)


def winner_first(sides: Tensor, labels: Tensor) -> Tensor:
    """Puts the preferred side of each pair first: sides (2, N, ...), labels (2, N)."""
    wins = (labels[0] > labels[1]).view(-1, *(1,) * (sides.ndim - 2))
    return torch.where(wins, sides, sides.flip(0))


def errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes the mean squared errors over C, h, w, in float32 or wider: (2, N, C, h, w) -> (2, N)."""
    return (prediction - target).square().flatten(2).mean(-1)
