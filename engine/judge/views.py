"""What a judge in training is shown of pairs of images, by its kind: images as SPO decodes them, or noisy latents."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..config.judge_training import JudgeTrainingConfig
from ..models.base_model import load_unet
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import LatentDiffusion
from .denoiser import Denoiser, Noiser
from .find import AnyJudge
from .latent import LatentJudge
from .model import StepAwarePreferenceModel
from .pixels import training_pixels

Posterior = tuple[Tensor, Tensor]  # mean and std of images, as LatentDiffusion.posterior returns them


class Views(Protocol):
    """What a judge is shown of N pairs, as its `compare` takes it: (2, N, ...).

    noiser: noises the pairs, by the base model `noiser.diffusion`; unet: the network that runs in `noised`;
    reads_text: whether `noised` needs the Conditioning of the captions.
    """

    noiser: Noiser
    unet: nn.Module
    reads_text: bool

    def clean(self, images: Tensor) -> Tensor:
        """Shows images (2, N, 3, H, W) in [-1, 1] as they are, in training."""

    def noised(self, mean: Tensor, std: Tensor, cond: Conditioning | None, t: Tensor, rng: torch.Generator) -> Tensor:
        """Shows images at timesteps t (N,), in training; mean, std: what LatentDiffusion.posterior made of them."""

    def scored(
        self, images: Tensor, posterior: Posterior, t: int, cond: Conditioning | None, rng: torch.Generator
    ) -> Tensor:
        """Shows images (2, N, 3, H, W) at timestep t, 0: as they are, in the way in which candidates are scored."""


class ImageViews:
    """Images, which the frozen base model has predicted from noisy latents."""

    reads_text = True

    def __init__(self, judge: StepAwarePreferenceModel, denoiser: Denoiser):
        self.judge, self.noiser, self.unet = judge, denoiser, denoiser.unet

    def clean(self, images: Tensor) -> Tensor:
        return training_pixels(self.judge, images)

    def noised(self, mean: Tensor, std: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        return training_pixels(self.judge, self.noiser.show(mean, std, cond, t, rng))

    def scored(self, images: Tensor, posterior: Posterior, t: int, cond: Conditioning, rng: torch.Generator) -> Tensor:
        if t:
            images = self.noiser.show(*posterior, cond, torch.full((len(cond),), t, device=images.device), rng)
        return self.judge.pixels(images.flatten(0, 1)).unflatten(0, images.shape[:2])


class LatentViews:
    """Noisy latents, as they are."""

    reads_text = False

    def __init__(self, noiser: Noiser):
        self.noiser, self.unet = noiser, nn.Identity()

    def clean(self, images: Tensor) -> Tensor:
        return self._latents(self.noiser.diffusion.posterior(images)[0])

    def noised(self, mean: Tensor, std: Tensor, cond: None, t: Tensor, rng: torch.Generator) -> Tensor:
        return self.noiser.noised(mean, std, t, rng).unflatten(0, mean.shape[:2])

    def scored(self, images: Tensor, posterior: Posterior, t: int, cond: None, rng: torch.Generator) -> Tensor:
        if not t:
            return self._latents(posterior[0])
        return self.noised(*posterior, cond, torch.full((images.shape[1],), t, device=images.device), rng)

    def _latents(self, mean: Tensor) -> Tensor:
        return mean.float() * self.noiser.diffusion.vae.config.scaling_factor


def views_of(config: JudgeTrainingConfig, judge: AnyJudge, diffusion: LatentDiffusion) -> Views:
    """Returns the views of a judge's training; a judge of images needs the base model's UNet, which is loaded here."""
    if judge.kind == LatentJudge.kind:
        return LatentViews(Noiser(diffusion, config.noise_is_shared))
    unet = load_unet(config.model, diffusion.device)
    return ImageViews(judge, Denoiser(diffusion, unet, config.optim.guidance, config.noise_is_shared))
