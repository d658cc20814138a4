"""Trains the tiny decoder, an AutoencoderTiny that imitates the autoencoder's decoder on the latents of rollouts.

Those are predictions x0_hat of the base model, blurred ones from early steps too, and clean latents at the end. Its
encoder is neither trained nor used: the class has no decoder alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from strop.bench.tinyworld import models
from strop.bench.tinyworld.render import render
from strop.bench.tinyworld.train_vae import encode, psnr
from strop.bench.tinyworld.training import Progress, batches, cosine, generator, parameters, record, set_lr, stage_seed
from strop.bench.tinyworld.world import caption, sample_scenes
from strop.engine.config.training import ModelConfig
from strop.engine.models.base_model import load_unet
from strop.engine.models.guided_unet import unet_eps
from strop.engine.models.latent_diffusion import LatentDiffusion

FIRST, STEPS, GUIDANCE = 4, 20, 3.0  # of rollouts in configs/tinyworld.yaml: judged are the latents after step 4 of 20


@torch.no_grad()
def shown(weights: Path, count: int, rng: torch.Generator, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (latents (n, 4, 16, 16), images (n, 3, 64, 64) fp16 that the decoder of weights/sd/vae makes of them).

    n is `count` rounded down to whole batches of 64. name: of the progress lines.
    """
    model, cpu = ModelConfig(path=str(weights / "sd")), torch.device("cpu")
    diffusion, unet = LatentDiffusion.load(model, cpu), load_unet(model, cpu)
    schedule = diffusion.schedule(STEPS, eta=1.0, guidance=GUIDANCE)
    signal = diffusion.scheduler.alphas_cumprod[schedule.timesteps(torch.arange(STEPS), STEPS)][:, None, None, None]
    progress = Progress(name, count // 64, every=16)
    latents, images = [], []
    for part in range(count // 64):
        scenes, q = sample_scenes(64, rng), torch.rand(64, generator=rng)
        clean = encode(diffusion.vae, render(scenes, q, rng))
        step = torch.randint(FIRST + 1, STEPS + 1, (64,), generator=rng)  # STEPS itself stands for a clean latent
        noise = torch.randn(clean.shape, generator=rng)
        at = step.clamp(max=STEPS - 1)
        x = signal[at].sqrt() * clean + (1 - signal[at]).sqrt() * noise
        cond = diffusion.encode([caption(scene) for scene in scenes])
        x0_hat = schedule.x0_hat(x, unet_eps(unet, x, schedule.timesteps(at, 64), cond, guided=True), at)
        latents.append(torch.where((step == STEPS)[:, None, None, None], clean, x0_hat))
        images.append(diffusion.decode(latents[-1]).half())
        progress(part)
    return torch.cat(latents), torch.cat(images)


def train(weights: Path, steps: int = 4000, batch: int = 16, count: int = 4096) -> None:
    """Trains the decoder on `count` latents of the models in weights/sd and saves it to weights/tiny_decoder."""
    start = time.monotonic()
    rng = generator("tiny_decoder")
    latents, images = shown(weights, count, rng, "tiny_decoder/latents")
    tiny = models.tiny_decoder(stage_seed("tiny_decoder"))
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    rows = batches(len(latents), batch, rng)
    progress = Progress("tiny_decoder", steps)
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, peak=2e-3))
        row = next(rows)
        error = tiny.decode(latents[row]).sample - images[row].float()
        squared = error.square().mean()
        loss = squared + 0.05 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        progress(step, loss=loss, squared=squared)
    tiny.eval().half().save_pretrained(weights / "tiny_decoder")
    settings = {"steps": steps, "batch": batch, "latents": len(latents), "seconds": time.monotonic() - start}
    record(weights, "tiny_decoder", evaluate(weights, tiny.float()) | settings)


@torch.no_grad()
def evaluate(weights: Path, tiny: AutoencoderTiny, count: int = 512) -> dict[str, float | int]:
    """Measures the PSNR to the images of the autoencoder's decoder, on fresh latents, and the size of the decoder."""
    latents, images = shown(weights, count, generator("tiny_decoder/evaluate"), "tiny_decoder/evaluate")
    decoded = torch.cat([tiny.decode(part).sample for part in latents.split(64)])
    return {"parameters": parameters(tiny.decoder), "psnr": psnr(decoded, images.float())}
