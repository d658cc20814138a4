"""The common parts of tinyworld's training stages: seeds, learning rates, progress lines, EMA, the file of figures."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

ROOT_SEED = 2024


def stage_seed(stage: str) -> int:
    """Returns a stage's seed, which depends on its name alone, so that stages can run alone or in any order."""
    return zlib.crc32(f"{ROOT_SEED}/{stage}".encode())


def generator(stage: str) -> torch.Generator:
    """Returns a CPU generator for a stage (or a named part of one)."""
    return torch.Generator().manual_seed(stage_seed(stage))


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Returns the learning rate: a linear warm-up, then a half cosine down to 1 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Progress:
    """Prints averages of the given statistics, the rate and the time left, every `every` steps."""

    def __init__(self, stage: str, steps: int, every: int = 100) -> None:
        self.stage, self.steps, self.every = stage, steps, every
        self.start = time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}

    def __call__(self, step: int, **stats: torch.Tensor) -> None:
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        done = step + 1
        if done % self.every == 0 or done == self.steps:
            count = self.every if done % self.every == 0 else done % self.every
            shown = " ".join(f"{name} {float(total) / count:.4f}" for name, total in self.sums.items())
            self.sums = {}
            rate = done / (time.monotonic() - self.start)
            eta = (self.steps - done) / rate
            print(f"{self.stage} {done}/{self.steps} {shown} | {rate:.2f} steps/s, {eta / 60:.1f} min left", flush=True)


class EMA:
    """Averages a model's parameters exponentially over the steps, in a second copy of the model."""

    def __init__(self, model: nn.Module, average: nn.Module, decay: float) -> None:
        self.model, self.average, self.decay = model, average.requires_grad_(False).eval(), decay
        average.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for averaged, current in pairs:
            averaged.lerp_(current, 1 - decay)


def batches(count: int, size: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields endless index batches (size,) over `count` items, reshuffled every epoch, without the ragged tail."""
    while True:
        for rows in torch.randperm(count, generator=rng).split(size):
            if len(rows) == size:
                yield rows


def record(weights: Path, stage: str, figures: dict[str, float | int | str]) -> None:
    """Replaces a stage's entry in weights/figures.json."""
    path = weights / "figures.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    stages[stage] = {name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}
    weights.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stages, indent=2, sort_keys=True) + "\n")
    print(f"{stage}: {stages[stage]}", flush=True)


def parameters(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())
