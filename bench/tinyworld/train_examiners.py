"""Trains the two examiners on renders that look like a diffusion model's samples: decoded by the VAE, with a little
noise in the latent, sometimes blurred.

A quarter of the renders exaggerate q up to 1.5 and count as 1, so that shading and shadows beyond the renderer's range
are not extrapolated.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from strop.bench.tinyworld import examiners, models
from strop.bench.tinyworld.render import to_float
from strop.bench.tinyworld.train_vae import render_uint8, roundtrip
from strop.bench.tinyworld.training import Progress, batches, cosine, generator, parameters, record, set_lr, stage_seed
from strop.bench.tinyworld.world import sample_scenes

LATENT_NOISE = 0.2  # the largest deviation, against latents of deviation 1


def _qualities(count: int, rng: torch.Generator) -> torch.Tensor:
    """Draws qualities (count,): three quarters uniform in [0, 1], the others in [1, 1.5]."""
    u = torch.rand(count, generator=rng)
    return torch.where(torch.rand(count, generator=rng) < 0.75, u, 1 + 0.5 * u)


def _data(vae: AutoencoderKL, count: int, clean: float, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Returns (uint8 images, q, attributes): the first `clean` share as rendered, the others through the VAE."""
    scenes, q = sample_scenes(count, rng), _qualities(count, rng)
    images = render_uint8(scenes, q, rng)
    as_rendered = int(clean * count)
    images = torch.cat([images[:as_rendered], roundtrip(vae, images[as_rendered:], LATENT_NOISE, rng)])
    return images, q, examiners.attributes(scenes)


def _augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Blurs a third of the images slightly, and shifts all slightly in brightness."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = 0.6 * torch.rand(n, 1, 1, 1, generator=rng) * (torch.rand(n, 1, 1, 1, generator=rng) < 0.33)
    shift = 0.06 * (torch.rand(n, 1, 1, 1, generator=rng) - 0.5)
    return torch.lerp(images, blurred, amount) + shift


def _fit(model: nn.Module, stage: str, loss_of, data: tuple[torch.Tensor, ...], steps: int, peak: float) -> None:
    """Trains with AdamW over `data` in batches of 64; loss_of(outputs, q, attributes) -> scalar."""
    rng = generator(stage)
    images, q, wanted = data
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    rows = batches(len(images), 64, rng)
    progress = Progress(stage, steps, every=250)
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, peak))
        row = next(rows)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(_augment(to_float(images[row]), rng))
        loss = loss_of(outputs, q[row], wanted[row])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step, loss=loss)
    model.eval()


def _regressor_loss(outputs: torch.Tensor, q: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(outputs.float(), q.clamp(max=1), beta=0.1)


def _checker_loss(outputs: dict[str, torch.Tensor], q: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    losses = [
        F.cross_entropy(outputs[name].float(), wanted[:, i], ignore_index=examiners.IGNORED, reduction="sum") / len(q)
        for i, name in enumerate(examiners.HEADS)
    ]
    return torch.stack(losses).sum()


def train(weights: Path, count: int = 28672, steps: int = 1800) -> None:
    """Trains both examiners for the VAE in weights/sd/vae; saves weights/examiners and their figures."""
    start = time.monotonic()
    vae = AutoencoderKL.from_pretrained(weights / "sd" / "vae").eval()
    data = _data(vae, count, 0.3, generator("examiners/data"))
    print(f"examiners: data after {time.monotonic() - start:.0f} s", flush=True)
    checker = models.checker(examiners.head_sizes(), stage_seed("examiners/checker"))
    regressor = models.regressor(stage_seed("examiners/regressor"))
    _fit(regressor, "examiners/regressor", _regressor_loss, data, steps // 2, 2e-3)
    _fit(checker, "examiners/checker", _checker_loss, data, steps, 2e-3)
    folder = weights / "examiners"
    folder.mkdir(parents=True, exist_ok=True)
    for model, name in ((checker, "checker"), (regressor, "regressor")):
        half = {key: value.half().contiguous() for key, value in model.state_dict().items()}
        save_file(half, folder / f"{name}.safetensors")
        model.load_state_dict(half)
    figures = evaluate(vae, checker, regressor)
    size = {"parameters": parameters(checker, regressor), "seconds": time.monotonic() - start}
    record(weights, "examiners", figures | size)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, checker: nn.Module, regressor: nn.Module, count: int = 1024) -> dict[str, float]:
    """Evaluates both examiners on fresh renders decoded by the VAE: q uniform in [0, 1], and q in [1, 1.5]."""
    rng = generator("examiners/evaluate")
    scenes, q = sample_scenes(count, rng), torch.rand(count, generator=rng)
    wanted = examiners.attributes(scenes)
    images = to_float(roundtrip(vae, render_uint8(scenes, q, rng), 0.0, rng))
    noisy = to_float(roundtrip(vae, render_uint8(scenes, q, rng), LATENT_NOISE, rng))
    beyond = to_float(roundtrip(vae, render_uint8(scenes[:256], 1 + 0.5 * q[:256], rng), 0.0, rng))
    predicted = torch.cat([regressor(part) for part in images.split(128)]).clamp(0, 1)
    right = _right(checker, images, wanted)
    per_head = {f"checker_{name}": right[:, i].float().mean().item() for i, name in enumerate(examiners.HEADS)}
    return {
        "quality_r2": 1 - ((predicted - q).square().mean() / q.var()).item(),
        "quality_mean_error": (predicted - q).mean().item(),
        "quality_beyond_range": regressor(beyond).clamp(0, 1).mean().item(),
        "checker_accuracy": right.all(1).float().mean().item(),
        "checker_accuracy_noisy_latents": _right(checker, noisy, wanted).all(1).float().mean().item(),
        **per_head,
    }


def _right(checker: nn.Module, images: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    parts = zip(images.split(128), wanted.split(128), strict=True)
    return torch.cat([examiners.attributes_right(checker(part), target) for part, target in parts])
