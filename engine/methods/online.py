"""Loads the models of a method that draws its own samples: policy, base model, judge, and the judge's decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..config.training import Config
from ..judge.model import StepAwarePreferenceModel
from ..models.base_model import load_unet
from ..models.guided_unet import Savings
from ..models.latent_diffusion import LatentDiffusion
from ..models.policy import Policy, TrainedLora
from ..models.tiny_decoder import TinyDecoder
from ..schedules.schedule import Schedule
from ..speed.apply import prepare


@dataclass(frozen=True, slots=True)
class OnlineModels:
    """The models of a run. decoder: makes the judge's images; schedule: of rollout and update."""

    policy: Policy
    diffusion: LatentDiffusion
    decoder: LatentDiffusion | TinyDecoder
    judge: StepAwarePreferenceModel
    schedule: Schedule
    trainable: TrainedLora

    @classmethod
    def load(cls, config: Config, device: torch.device) -> OnlineModels:
        """Loads the models that a recipe names. Raises UserError for whatever the user has to put right."""
        diffusion = LatentDiffusion.load(config.model, device)
        unet = load_unet(config.model, device)
        judge = StepAwarePreferenceModel.load(config.judge, device)
        return cls.of(config, unet, diffusion, judge)

    @classmethod
    def of(
        cls,
        config: Config,
        unet: nn.Module,
        diffusion: LatentDiffusion,
        judge: StepAwarePreferenceModel,
        decoder: TinyDecoder | None = None,
    ) -> OnlineModels:
        """Takes networks that are loaded; the UNet becomes the policy's, and all are made as fast as the recipe asks.

        decoder: in place of the one that rollout.decoder names.
        """
        model, rollout, lora = config.model, config.rollout, config.lora
        savings = Savings.of(model, config.optim.micro_batch)
        policy = Policy(unet, lora.rank, lora.target_modules, config.run.seed, diffusion.latent_shape, savings)
        if rollout.decoder and decoder is None:
            decoder = TinyDecoder.load(rollout.decoder, model.dtype, diffusion)
        prepare(model, policy.unet, diffusion.vae, judge.clip)
        schedule = diffusion.schedule(rollout.num_steps, rollout.eta, rollout.guidance)
        return cls(policy, diffusion, decoder or diffusion, judge, schedule, TrainedLora(policy, config))
