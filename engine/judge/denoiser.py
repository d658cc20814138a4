"""Makes what a judge is trained on, which looks like what it will score in SPO.

A latent judge is shown latents noised to timestep t. For one of decoded images the frozen base model then predicts them
clean with guidance, and the VAE decodes that.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...kernels import DDIMCoefficients
from ..models.conditioning import Conditioning
from ..models.guided_unet import unet_eps
from ..models.latent_diffusion import LatentDiffusion
from ..schedules.schedule import Schedule


class Noiser:
    """Noises the latents of pairs of images to timestep t."""

    def __init__(self, diffusion: LatentDiffusion, shared_noise: bool):
        """shared_noise: whether both images of a pair get the same noise."""
        self.diffusion, self.shared_noise = diffusion, shared_noise
        self.alphas = diffusion.scheduler.alphas_cumprod.float().to(diffusion.device)
        self.timesteps = len(self.alphas)  # 1000

    def noised(self, mean: Tensor, std: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
        """Draws a latent of each image, then noise, and adds it at timesteps t (N,): (2N, C, h, w).

        mean, std (2, N, C, h, w): what `LatentDiffusion.posterior` returned.
        """
        noise = torch.randn((2 * len(t), *mean.shape[2:]), generator=rng, device=mean.device, dtype=mean.dtype)
        latents = (mean.flatten(0, 1) + std.flatten(0, 1) * noise) * self.diffusion.vae.config.scaling_factor
        latents = latents.float()  # (2N, C, h, w)
        count = len(t) if self.shared_noise else len(latents)
        noise = torch.randn((count, *latents.shape[1:]), generator=rng, device=latents.device)
        return self.add_noise(latents, noise.repeat(len(latents) // count, 1, 1, 1), t.repeat(2))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Computes sqrt(a_t) latents + sqrt(1 - a_t) noise, both (N, C, h, w). Source: arXiv 2006.11239, eq. 4."""
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


class Denoiser(Noiser):
    """Noises images to timestep t and lets the frozen base model predict them clean."""

    def __init__(
        self, diffusion: LatentDiffusion, unet: UNet2DConditionModel, guidance: float, shared_noise: bool = True
    ):
        """Freezes the UNet. guidance: the scale of classifier-free guidance; 1 switches it off."""
        super().__init__(diffusion, shared_noise)
        self.unet = unet.eval().requires_grad_(False)
        prediction = diffusion.scheduler.config.prediction_type
        coefficients = DDIMCoefficients.build(self.alphas, self.timesteps, 1.0, prediction, steps_offset=0)
        self.schedule = Schedule(coefficients, guidance, diffusion.device)  # step s stands for t = 999 - s

    def __call__(self, images: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Computes the decoded x0_hat of both images of each pair.

        images (2, N, 3, H, W) in [-1, 1]; cond of N prompts; t (N,) int64 in 0..999. Returns (2, N, 3, H, W), about
        [-1, 1].
        """
        return self.show(*self.diffusion.posterior(images), cond, t, rng)

    @torch.no_grad()
    def show(self, mean: Tensor, std: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Does what a call does, from the mean and std that `LatentDiffusion.posterior` returned.

        There is one UNet forward in all; the VAE decodes one image of each pair after the other, which halves its
        memory.
        """
        x, t = self.noised(mean, std, t, rng), t.repeat(2)
        eps = unet_eps(self.unet, x, t, cond.repeat(2), guided=self.schedule.guided)  # (1 or 2, 2N, C, h, w)
        return torch.stack([self.diffusion.decode(side).float() for side in self.x0_hat(x, eps, t).chunk(2)])

    def x0_hat(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Predicts clean latents at training timesteps t (N,). x (N, C, h, w), eps (G, N, C, h, w) -> (N, C, h, w)."""
        return self.schedule.x0_hat(x, eps, self.timesteps - 1 - t)
