"""Makes the images that a judge is trained on, which look like those that it will score in SPO.

An image is noised to timestep t, the frozen base model predicts it clean with guidance, and the VAE decodes that.
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


class Denoiser:
    """Noises images to timestep t and lets the frozen base model predict them clean."""

    def __init__(self, diffusion: LatentDiffusion, unet: UNet2DConditionModel, guidance: float):
        """Freezes the UNet. guidance: the scale of classifier-free guidance; 1 switches it off."""
        self.diffusion = diffusion
        self.unet = unet.eval().requires_grad_(False)
        self.alphas = diffusion.scheduler.alphas_cumprod.float().to(diffusion.device)
        self.timesteps = len(self.alphas)  # 1000
        prediction = diffusion.scheduler.config.prediction_type
        coefficients = DDIMCoefficients.build(self.alphas, self.timesteps, 1.0, prediction, steps_offset=0)
        self.schedule = Schedule(coefficients, guidance, diffusion.device)  # step s stands for t = 999 - s

    def __call__(self, images: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Computes the decoded x0_hat of both images of each pair; both get the same noise.

        images (2, N, 3, H, W) in [-1, 1]; cond of N prompts; t (N,) int64 in 0..999. Returns (2, N, 3, H, W), about
        [-1, 1].
        """
        return self.show(*self.diffusion.posterior(images), cond, t, rng)

    @torch.no_grad()
    def show(self, mean: Tensor, std: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Does what a call does, from the mean and std that `LatentDiffusion.posterior` returned.

        It draws from rng a latent sample of each image, then one noise for each pair. There is one UNet forward in
        all; the VAE decodes one image of each pair after the other, which halves its memory.
        """
        noise = torch.randn((2 * len(t), *mean.shape[2:]), generator=rng, device=mean.device, dtype=mean.dtype)
        latents = (mean.flatten(0, 1) + std.flatten(0, 1) * noise) * self.diffusion.vae.config.scaling_factor
        latents = latents.float()  # (2N, C, h, w)
        noise = torch.randn((len(t), *latents.shape[1:]), generator=rng, device=latents.device)
        t = t.repeat(2)  # (2N,)
        x = self.add_noise(latents, noise.repeat(2, 1, 1, 1), t)
        eps = unet_eps(self.unet, x, t, cond.repeat(2), guided=self.schedule.guided)  # (1 or 2, 2N, C, h, w)
        return torch.stack([self.diffusion.decode(side).float() for side in self.x0_hat(x, eps, t).chunk(2)])

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Computes sqrt(a_t) latents + sqrt(1 - a_t) noise, both (N, C, h, w). Source: arXiv 2006.11239, eq. 4."""
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def x0_hat(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Predicts clean latents at training timesteps t (N,). x (N, C, h, w), eps (G, N, C, h, w) -> (N, C, h, w)."""
        return self.schedule.x0_hat(x, eps, self.timesteps - 1 - t)
