"""The models of a post-training: the policy, the base model around it, and the judge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..config.offline import OfflineConfig
from ..config.online import SamplingConfig
from ..config.training import Config
from ..data.decided_pairs import DecidedPairs, decided_pairs
from ..judge.find import AnyJudge, load_auditor, load_judge
from ..models.base_model import load_unet
from ..models.guided_unet import Savings
from ..models.latent_diffusion import LatentDiffusion
from ..models.policy import Policy, TrainedLora
from ..runtime.ranks import Ranks
from ..schedules.schedule import Schedule
from ..speed.apply import prepare


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a run, loaded and made as fast as the recipe asks. trainable: the policy's LoRA.

    auditor: a second judge, None where the recipe has none.
    """

    policy: Policy
    diffusion: LatentDiffusion
    judge: AnyJudge
    trainable: TrainedLora
    auditor: AnyJudge | None = None

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Models:
        """Loads the models that a recipe names. Raises UserError for whatever the user has to put right."""
        diffusion = LatentDiffusion.load(config.model, device)
        unet = load_unet(config.model, device)
        judge = load_judge(config.judge, config.model, diffusion, unet)
        auditor = load_auditor(config.auditor, config.model, diffusion, unet) if config.auditor else None
        return replace(cls.of(config, unet, diffusion, judge), auditor=auditor)

    @classmethod
    def of(cls, config: Config, unet: nn.Module, diffusion: LatentDiffusion, judge: AnyJudge) -> Models:
        """Takes networks that are loaded; the UNet becomes the policy's."""
        model, lora = config.model, config.lora
        savings = Savings.of(model, config.optim.micro_batch)
        policy = Policy(unet, lora.rank, lora.target_modules, config.run.seed, diffusion.latent_shape, savings)
        prepare(model, policy.unet, diffusion.vae, judge.network)
        return cls(policy, diffusion, judge, TrainedLora(policy, config))

    def schedule(self, rollout: SamplingConfig) -> Schedule:
        """Builds the schedule of a rollout."""
        return self.diffusion.schedule(rollout.num_steps, rollout.eta, rollout.guidance)

    def pairs(self, config: OfflineConfig, ranks: Ranks) -> DecidedPairs:
        """Finds, checks and caches the labelled pairs of a recipe, as decided_pairs does."""
        return decided_pairs(config, self.diffusion, ranks)
