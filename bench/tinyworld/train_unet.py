"""Trains the base model, UNet and text encoder, jointly on latents of renders of every quality (mean q 0.45).

It predicts the noise, with captions dropped one time in ten (for guidance). Timesteps are drawn more often from the
noisy half, and weigh more there, because layout and colours, and with them the caption, are decided there. The EMA is
saved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline

from strop.bench.tinyworld import models
from strop.bench.tinyworld.render import contact_sheet, to_float
from strop.bench.tinyworld.train_vae import decode, encode, render_uint8
from strop.bench.tinyworld.training import (
    EMA,
    Progress,
    batches,
    cosine,
    generator,
    parameters,
    record,
    set_lr,
    stage_seed,
)
from strop.bench.tinyworld.world import caption, sample_quality, sample_scenes

CAPTION_DROPOUT = 0.1


def make_latents(
    vae: AutoencoderKL, count: int, rng: torch.Generator, narrow: bool = True
) -> tuple[torch.Tensor, list[str]]:
    """Returns `count` latents (count, 4, 16, 16) in fp16 and their captions, made in slices to bound memory.

    narrow: whether they are computed in bf16.
    """
    latents, captions = [], []
    progress = Progress("unet/latents", count // 1024, every=8)
    for step in range(count // 1024):
        scenes = sample_scenes(1024, rng)
        images = render_uint8(scenes, sample_quality(1024, rng), rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            latents.append(encode(vae, to_float(images), batch=32).half())
        captions += [caption(scene) for scene in scenes]
        progress(step)
    return torch.cat(latents), captions


def _timesteps(count: int, rng: torch.Generator) -> torch.Tensor:
    """Draws training timesteps (count,) int64, denser towards 999: mean 600."""
    return (1000 * (1 - torch.rand(count, generator=rng) ** 1.5)).long().clamp(0, 999)


@dataclass(frozen=True, slots=True)
class Training:
    """How UNet and text encoder are trained: optimizer steps, captions a step, latents made, peak learning rate.

    narrow: whether latents are made in bf16, which is slow on a CPU that only imitates it. save_every: steps.
    """

    steps: int = 7000
    batch: int = 32
    latents: int = 32768
    peak: float = 1e-3
    narrow: bool = True
    save_every: int = 1000


def train(weights: Path, training: Training = Training()) -> None:
    """Trains the UNet and the text encoder for the VAE in weights/sd/vae; saves weights/sd as it goes."""
    start = time.monotonic()
    vae = AutoencoderKL.from_pretrained(weights / "sd" / "vae").eval()
    tokens = models.tokenizer()
    parts = torch.nn.ModuleDict({"unet": models.unet(stage_seed("unet")), "text": models.text_encoder(tokens, 1)})
    fit(weights, vae, parts, training, generator("unet"))
    seconds = time.monotonic() - start
    counts = {"steps": training.steps, "batch": training.batch, "latents": training.latents}
    record(weights, "unet", {"parameters": parameters(parts["unet"]), **counts, "seconds": seconds})


def fit(
    weights: Path, vae: AutoencoderKL, parts: torch.nn.ModuleDict, training: Training, rng: torch.Generator
) -> None:
    """Trains parts["unet"] and parts["text"] on renders drawn by `rng`; saves their EMA with the VAE as weights/sd."""
    tokens, steps, batch = models.tokenizer(), training.steps, training.batch
    latents, captions = make_latents(vae, training.latents, rng, training.narrow)
    ids, empty = models.tokenize(tokens, captions), models.tokenize(tokens, [""])
    average = torch.nn.ModuleDict({"unet": models.unet(0), "text": models.text_encoder(tokens, 0)})
    ema = EMA(parts, average, decay=0.999)
    optimizer = torch.optim.AdamW(parts.parameters(), betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    signal = models.scheduler().alphas_cumprod[:, None, None, None]
    weight = signal.rsqrt().clamp(max=4)  # square root of what predicting v would weigh
    rows = batches(len(latents), batch, rng)
    progress = Progress("unet", steps)
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, training.peak, warmup=200))
        row = next(rows)
        x0, t = latents[row].float(), _timesteps(batch, rng)
        noise = torch.randn(x0.shape, generator=rng)
        x_t = signal[t].sqrt() * x0 + (1 - signal[t]).sqrt() * noise
        dropped = torch.rand(batch, 1, generator=rng) < CAPTION_DROPOUT
        states = parts["text"](torch.where(dropped, empty, ids[row])).last_hidden_state
        error = F.mse_loss(parts["unet"](x_t, t, states).sample, noise, reduction="none")
        loss = (weight[t] * error).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        progress(step, loss=loss, error=error.mean())
        if (step + 1) % training.save_every == 0 or step + 1 == steps:
            save(weights, vae, average)


def save(weights: Path, vae: AutoencoderKL, average: torch.nn.ModuleDict) -> None:
    """Writes weights/sd as an fp16 StableDiffusionPipeline folder; the models themselves stay fp32."""
    unet, text = models.unet(0), models.text_encoder(models.tokenizer(), 0)
    unet.load_state_dict(average["unet"].state_dict())
    text.load_state_dict(average["text"].state_dict())
    frozen = models.vae(0)
    frozen.load_state_dict(vae.state_dict())
    frozen.register_to_config(scaling_factor=vae.config.scaling_factor)
    models.pipeline(frozen.half(), unet.half(), text.half()).save_pretrained(weights / "sd", safe_serialization=True)
    models.load_as_float32(weights / "sd" / "text_encoder")


def load_pipeline(weights: Path) -> StableDiffusionPipeline:
    """Loads weights/sd in fp32, without progress bars."""
    pipe = StableDiffusionPipeline.from_pretrained(weights / "sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, prompts: list[str], guidance: float, rng: torch.Generator, steps: int = 20
) -> torch.Tensor:
    """Samples images (n, 3, 64, 64) in [-1, 1]: DDIM, eta 0, classifier-free guidance, 64 prompts at a time."""
    pipe.scheduler.set_timesteps(steps)
    images = []
    for i in range(0, len(prompts), 64):
        part = prompts[i : i + 64]
        ids = models.tokenize(pipe.tokenizer, [""] * len(part) + part)
        states = pipe.text_encoder(ids).last_hidden_state
        x = torch.randn(len(part), 4, 16, 16, generator=rng)
        for t in pipe.scheduler.timesteps:
            null, text = pipe.unet(torch.cat([x, x]), t, states).sample.chunk(2)
            x = pipe.scheduler.step(null + guidance * (text - null), t, x).prev_sample
        images.append(decode(pipe.vae, x))
    return torch.cat(images)


def evaluate(weights: Path, guidance: float = 4.0, count: int = 384) -> dict[str, float]:
    """Measures alignment and quality of samples for held-out prompts by the examiners; saves a contact sheet."""
    from PIL import Image

    from strop.bench.tinyworld import examiners

    prompts = (Path(__file__).parent / "prompts" / "heldout.txt").read_text().splitlines()[:count]
    images = sample(load_pipeline(weights), prompts, guidance, generator("unet/evaluate"))
    scores = examiners.load("cpu", weights)(images, prompts)
    Image.fromarray(contact_sheet(images[:48], 12).numpy()).save(weights / "samples.png")
    quality = scores["quality"]
    return {
        "guidance": guidance,
        "alignment": scores["alignment"].float().mean().item(),
        "quality_mean": quality.mean().item(),
        "quality_std": quality.std().item(),
        "quality_10th": quality.quantile(0.1).item(),
        "quality_90th": quality.quantile(0.9).item(),
    }
