"""What a judge in training is shown: images as SPO's judge will meet them.

An image is noised to timestep t, predicted clean by the frozen base model with guidance, and decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...kernels import DDIMCoefficients
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import LatentDiffusion
from ..models.policy import unet_eps
from ..schedules.schedule import Schedule
from .model import StepAwarePreferenceModel


class Denoiser:
    """The frozen base model as a lens: what it takes an image for when it sees it noised to timestep t."""

    def __init__(self, diffusion: LatentDiffusion, unet: UNet2DConditionModel, guidance: float):
        """guidance: the scale of classifier-free guidance; 1 switches it off."""
        self.diffusion = diffusion
        self.unet = unet.eval().requires_grad_(False)
        self.alphas = diffusion.scheduler.alphas_cumprod.float().to(diffusion.device)
        self.timesteps = len(self.alphas)  # 1000
        prediction = diffusion.scheduler.config.prediction_type
        coefficients = DDIMCoefficients.build(self.alphas, self.timesteps, 1.0, prediction, steps_offset=0)
        self.schedule = Schedule(coefficients, guidance, diffusion.device)  # step s stands for t = 999 - s

    def __call__(self, images: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Decoded x0_hat of both images of each pair; the two are noised alike, so that only the images differ.

        images (2, N, 3, H, W) in [-1, 1]; cond of N prompts; t (N,) int64 in 0..999. Returns (2, N, 3, H, W), about
        [-1, 1].
        """
        return self.show(*self.posterior(images), cond, t, rng)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (2, N, C, h, w) of the VAE's latents of images (2, N, 3, H, W), not scaled."""
        vae = self.diffusion.vae
        sides = [vae.encode(side.to(vae.dtype)).latent_dist for side in images]
        return torch.stack([side.mean for side in sides]), torch.stack([side.std for side in sides])

    @torch.no_grad()
    def show(self, mean: Tensor, std: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """As a call, for what `posterior` gave.

        Draws from rng the sample of each image, then one noise for each pair. One UNet forward for all; the VAE takes
        one side after the other, which halves its memory.
        """
        noise = torch.randn((2 * len(t), *mean.shape[2:]), generator=rng, device=mean.device, dtype=mean.dtype)
        latents = (mean.flatten(0, 1) + std.flatten(0, 1) * noise) * self.diffusion.vae.config.scaling_factor
        latents = latents.float()  # (2N, C, h, w)
        noise = torch.randn((len(t), *latents.shape[1:]), generator=rng, device=latents.device)
        t = t.repeat(2)  # (2N,)
        x = self.add_noise(latents, noise.repeat(2, 1, 1, 1), t)
        eps = unet_eps(self.unet, x, t, cond.repeat(2), guided=self.schedule.guided)  # (1 or 2, 2N, C, h, w)
        return torch.stack([self.diffusion.decode(side).float() for side in self.x0_hat(x, eps, t).chunk(2)])

    def release_encoders(self) -> None:
        """Frees the device of the text encoders and of the VAE's encoder, once all that they make is in the cache."""
        self.diffusion.release_text_encoders()
        self.diffusion.vae.encoder.to("cpu")

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a_t) latents + sqrt(1 - a_t) noise (DDPM, arXiv 2006.11239, formula 4). latents, noise (N, C, h, w)."""
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def x0_hat(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Predicted clean latents at training timesteps t (N,). x (N, C, h, w), eps (G, N, C, h, w) -> (N, C, h, w)."""
        return self.schedule.x0_hat(x, eps, self.timesteps - 1 - t)


def training_pixels(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in about [-1, 1] -> normalised pixels (..., 3, S, S), as the published training has them.

    Clamp, bicubic to a square, clamp. Scoring (StepAwarePreferenceModel.pixels) clamps only after the resize and crops
    what is not square: the same for square images without overshoot.
    """
    flat = (images.flatten(0, -4).float() / 2 + 0.5).clamp(0, 1)
    flat = F.interpolate(flat, size=(judge.size, judge.size), mode="bicubic", align_corners=False).clamp(0, 1)
    return ((flat - judge.mean) / judge.std).unflatten(0, images.shape[:-3])
