"""Trains the autoencoder: f = 4, squared error with a little absolute error, and a light KL term, in bf16 autocast.

After training the latents are standardised channel by channel; the factors are folded into the two 1x1 convolutions
around the latent, so that `scaling_factor` is 1 and a diffusion model sees zero mean and unit deviation.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from strop.bench.tinyworld import models
from strop.bench.tinyworld.render import render, to_float, to_uint8
from strop.bench.tinyworld.training import Progress, cosine, generator, parameters, record, set_lr, stage_seed
from strop.bench.tinyworld.world import Scene, sample_quality, sample_scenes

KL_WEIGHT = 1e-3  # against squared error, both summed over an image


def _loss(vae: AutoencoderKL, images: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (loss, squared error) of images (n, 3, 64, 64)."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - images
    squared = error.square().mean()
    kl = posterior.kl().float().sum() / images.numel()
    return squared + 0.05 * error.abs().mean() + KL_WEIGHT * kl, squared


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Encodes to latents (n, 4, 16, 16), the mode times scaling_factor."""
    latents = [vae.encode(part).latent_dist.mode() for part in images.split(batch)]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Decodes latents (n, 4, 16, 16) to images (n, 3, 64, 64) in [-1, 1]."""
    parts = (latents / vae.config.scaling_factor).split(batch)
    return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in parts])


def render_uint8(scenes: list[Scene], q: torch.Tensor, rng: torch.Generator, batch: int = 256) -> torch.Tensor:
    """Renders in batches, to uint8 (n, 3, 64, 64)."""
    parts = [render(scenes[i : i + batch], q[i : i + batch], rng) for i in range(0, len(scenes), batch)]
    return torch.cat([to_uint8(part) for part in parts])


@torch.no_grad()
def roundtrip(vae: AutoencoderKL, images: torch.Tensor, noise: float, rng: torch.Generator) -> torch.Tensor:
    """Encodes and decodes uint8 images (n, 3, 64, 64), to uint8; each latent gets Gaussian noise of a deviation drawn
    uniformly from [0, noise]."""
    decoded = []
    for part in images.split(32):
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(vae, to_float(part)).float()
        amount = noise * torch.rand(len(part), 1, 1, 1, generator=rng)
        latents = latents + amount * torch.randn(latents.shape, generator=rng)
        with torch.autocast("cpu", torch.bfloat16):
            decoded.append(to_uint8(decode(vae, latents).float()))
    return torch.cat(decoded)


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Folds the latents' mean and deviation (over `images`) into quant_conv and post_quant_conv; scaling_factor 1."""
    latents = encode(vae, images) / vae.config.scaling_factor
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()  # the second half is the log variance
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def psnr(decoded: torch.Tensor, images: torch.Tensor) -> float:
    """Computes the PSNR in decibels, over images in [-1, 1]."""
    return 10 * math.log10(4 / F.mse_loss(decoded, images).item())


def train(weights: Path, steps: int = 5000, batch: int = 8) -> None:
    """Trains the autoencoder and saves it to weights/sd/vae."""
    start = time.monotonic()
    rng = generator("vae")
    vae = models.vae(stage_seed("vae"))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    progress = Progress("vae", steps)
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, peak=2e-3))
        images = render(sample_scenes(batch, rng), sample_quality(batch, rng), rng)
        loss, squared = _loss(vae, images, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress(step, loss=loss, squared=squared)
        if (step + 1) % 1000 == 0:
            vae.save_pretrained(weights / "sd" / "vae")
    vae.eval()
    standardise(vae, render(sample_scenes(512, rng), sample_quality(512, rng), rng))
    vae = vae.half()
    vae.save_pretrained(weights / "sd" / "vae")
    settings = {"steps": steps, "batch": batch, "seconds": time.monotonic() - start}
    record(weights, "vae", evaluate(vae.float()) | settings)


def evaluate(vae: AutoencoderKL, count: int = 512) -> dict[str, float | int]:
    """Measures PSNR over all q and by thirds of q, and the deviation of the latents, on fresh renders."""
    rng = generator("vae/evaluate")
    q = torch.rand(count, generator=rng)
    images = to_float(render_uint8(sample_scenes(count, rng), q, rng))
    latents = encode(vae, images)
    decoded = decode(vae, latents)
    thirds = (3 * q).long().clamp(max=2)
    by_third = {f"psnr_q_third_{i + 1}": psnr(decoded[thirds == i], images[thirds == i]) for i in range(3)}
    return {
        "parameters": parameters(vae),
        "psnr": psnr(decoded, images),
        "latent_std": latents.std().item(),
        **by_third,
    }
