"""First phase of an evaluation: every system draws every prompt from the same noise, into files.

One base model is in memory at a time, and of it one UNet, loaded anew for each system, so that no LoRA leaves a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..models.base_model import BaseModel, load_unet
from ..models.conditioning import Conditioning
from ..models.guided_unet import GuidedUNet, Savings
from ..models.latent_diffusion import LatentDiffusion
from ..models.lora_source import add_lora
from ..speed.apply import remove_idle_work
from .images import Batch, Images
from .progress import Progress
from .protocols import Protocol
from .sampling import Sampler
from .systems import System


@dataclass(frozen=True, slots=True)
class Work:
    """What this process draws and scores: its batches of the images of P prompts by a protocol, on its device."""

    protocol: Protocol
    prompts: list[str]
    batches: Sequence[Batch]
    images: Images
    device: torch.device


def draw(systems: Sequence[System], work: Work, progress: Progress) -> None:
    """Draws the images that are not there yet. Raises UserError for images of another size, before drawing any."""
    todo = {system.name: _missing(system, work) for system in systems}
    for _, group in groupby(systems, key=lambda system: system.model):
        group = [system for system in group if todo[system.name]]
        if not group:
            continue
        diffusion = LatentDiffusion.load(group[0].model, work.device)
        host = torch.device("cpu")
        cond = diffusion.encode(work.prompts, onto=host).to(host)
        diffusion.release_text_encoders()
        for system in group:
            _draw(_sampler(system, diffusion, work.protocol), cond, system.name, todo[system.name], work, progress)


@torch.no_grad()
def _draw(
    sampler: Sampler, cond: Conditioning, system: str, batches: Sequence[Batch], work: Work, progress: Progress
) -> None:
    noise: dict[int, Tensor] = {}
    count = sum(len(batch.numbers) for batch in batches)
    with progress.stage(f"drawing {system}", count, "images") as done:
        for batch in batches:
            if batch.seed not in noise:
                noise = {batch.seed: noise_of(batch.seed, sampler, len(work.prompts), work.protocol)}
            rows = torch.tensor(batch.numbers)
            x, part = noise[batch.seed][rows].to(work.device), cond[rows].to(work.device)
            work.images.write(system, batch, sampler(x, part, lambda: None))
            done(len(rows))


def noise_of(seed: int, sampler: Sampler, prompts: int, protocol: Protocol) -> Tensor:
    """Returns the noise (P, C, h, w) of image `seed` of all prompts, on the host, as Protocol.noise says."""
    noise = sampler.noise(prompts if protocol.noise == "prompt" else 1, protocol.seed + seed)
    return noise.expand(prompts, -1, -1, -1).to("cpu")


def _missing(system: System, work: Work) -> list[Batch]:
    size = BaseModel.find(system.model).image_size()
    for batch in work.batches:
        work.images.check(system.name, batch, size)
    return [batch for batch in work.batches if not work.images.has(system.name, batch)]


def _sampler(system: System, diffusion: LatentDiffusion, protocol: Protocol) -> Sampler:
    model = system.model
    unet = load_unet(model, diffusion.device)
    if system.lora is not None:
        add_lora(unet, system.lora, system.source, model.path, system.strength)
    network = GuidedUNet(unet, diffusion.latent_shape, Savings.of(model, 1))
    remove_idle_work(unet, diffusion.vae, model.fold_upsample)
    return Sampler(network, diffusion, diffusion.schedule(protocol.steps, protocol.eta, protocol.guidance))
