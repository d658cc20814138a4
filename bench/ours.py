"""Runs one iteration of engine/train.py on loaded networks, with the interface of published.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import UNet2DConditionModel

from strop.bench.published import Clock
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.data.embeddings import Embeddings
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.models import Models
from strop.engine.methods.spo.pairs import PreferencePairs, balance
from strop.engine.methods.spo.rollout import Rollout
from strop.engine.methods.spo.update import Learner
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.tiny_decoder import TinyDecoder, load_decoder
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks


class Ours:
    """The parts of a run of one process."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        diffusion: LatentDiffusion,
        judge: StepAwarePreferenceModel,
        config: SPOConfig,
        decoder: TinyDecoder | None = None,
    ):
        """Takes `unet` for the policy, whose LoRA starts from run.seed; decoder: in place of rollout.decoder's."""
        self.models = Models.of(config, unet, diffusion, judge)
        self.policy, self.diffusion, self.judge, self.config = self.models.policy, diffusion, judge, config
        self.ranks = Ranks(0, 1, diffusion.device)
        settings = AdamWSettings.of(config)
        self.optimizer = build_optimizer(self.policy.unet, settings, self.ranks)
        self.schedule = self.models.schedule(config.rollout)
        self.decoder = decoder or load_decoder(config.rollout.decoder, config.model.dtype, diffusion)
        self.learner = Learner(self.policy, self.schedule, config.optim)


def roll(ours: Ours, cond: Conditioning, rng: torch.Generator, clock: Clock = nullcontext) -> PreferencePairs:
    """Returns the pairs of a rollout of the prompts of `cond`."""
    config = ours.config.rollout
    rollout = Rollout(ours.policy, ours.decoder, ours.judge, ours.schedule, config, clock)
    with ours.policy.sampling(cond, config.text_kv) as sampling_cond:
        return rollout(sampling_cond, rng).pairs


def learn(
    ours: Ours, pairs: PreferencePairs, cond: Conditioning, rng: torch.Generator, clock: Clock = nullcontext
) -> None:
    """Trains on all passes over the shuffled pairs."""
    for batch in ours.learner.batches(pairs, cond, rng):
        loss, _ = ours.learner.loss(batch)
        ours.optimizer.backward(loss)
        with clock("update/optimizer"):
            ours.optimizer.step()


def iteration(
    ours: Ours,
    prompts: Sequence[str],
    rng: torch.Generator,
    shuffle: torch.Generator,
    clock: Clock = nullcontext,
) -> PreferencePairs:
    """Rolls out, shuffles and trains on all passes over the pairs; returns them, shuffled.

    Prompts are encoded here, as if none came twice in a run; train.py encodes each once, before the loop.
    """
    with clock("text"):
        cond = Embeddings(ours.diffusion, ours.judge, [list(prompts)])[prompts]
    pairs = roll(ours, cond, rng, clock)
    with clock("update"):
        pairs = balance(pairs, len(prompts), ours.ranks, shuffle)
        learn(ours, pairs, cond, shuffle, clock)
    return pairs
