"""Draws images from noise: the deterministic DDIM walk and the decoding that all evaluations share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..models.guided_unet import GuidedUNet
from ..models.latent_diffusion import LatentDiffusion
from ..schedules.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Sampler:
    """A UNet, the frozen parts around it, and the schedule of the walk. text_kv: as of GuidedUNet.sampling."""

    network: GuidedUNet
    diffusion: LatentDiffusion
    schedule: Schedule
    text_kv: bool = True

    def noise(self, count: int, seed: int) -> Tensor:
        """Returns the noise (count, C, h, w) that a seed draws, on the models' device."""
        rng = torch.Generator(self.diffusion.device).manual_seed(seed)
        return self.schedule.prior((count, *self.network.latent_shape), rng)

    def __call__(self, x: Tensor, cond: Conditioning, on_step: Callable[[], object]) -> Tensor:
        """Returns images (N, 3, H, W) in [-1, 1] from noise (N, C, h, w); on_step is called after each step."""
        with self.network.sampling(cond, self.text_kv) as cond:
            for i in range(self.schedule.num_steps):
                eps = self.network.eps(x, self.schedule.timesteps(i, len(x)), cond, self.schedule.guided)
                x = self.schedule.mean(x, eps, i)
                on_step()
            return self.diffusion.decode(x).float().clamp(-1, 1)
