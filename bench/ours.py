"""One iteration of engine/train.py on networks that are given, with the interface of published.py: its counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import UNet2DConditionModel

from strop.bench.published import Clock
from strop.engine.config.training import Config
from strop.engine.data.embeddings import Embeddings
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.spo.pairs import PreferencePairs, balance
from strop.engine.methods.spo.rollout import forking_steps, rollout
from strop.engine.methods.spo.update import learn
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.models.tiny_decoder import TinyDecoder
from strop.engine.runtime import optimizer as zero
from strop.engine.runtime.metrics import Metrics
from strop.engine.runtime.ranks import Ranks
from strop.engine.speed.apply import prepare


class Ours:
    """The parts of a run of one process."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        diffusion: LatentDiffusion,
        judge: StepAwarePreferenceModel,
        config: Config,
        decoder: TinyDecoder | None = None,
    ):
        """Takes `unet` for the policy, whose LoRA starts from run.seed; decoder: that of rollout.decoder if given."""
        lora, given, model, shape = config.lora, config.rollout, config.model, diffusion.latent_shape
        savings = model.unet_rows, model.merges_lora, model.share_halves
        self.policy = Policy(unet, lora.rank, lora.target_modules, config.run.seed, shape, *savings)
        prepare(model, unet, diffusion.vae, judge.clip)
        self.policy.multiple = config.optim.micro_batch if model.compile else 1
        self.diffusion, self.judge, self.config = diffusion, judge, config
        self.schedule = diffusion.schedule(given.num_steps, given.eta, given.guidance)
        self.ranks = Ranks(0, 1, diffusion.device)
        settings = zero.AdamWSettings.of(config.optim, config.zero.stage, config.model.dtype)
        self.optimizer = zero.build(self.policy.unet, settings, self.ranks)
        self.metrics = Metrics(config.run.dir, diffusion.device, False, start=0, iterations=config.run.iterations)
        self.forks = forking_steps(self.schedule, given)
        if given.decoder and decoder is None:
            decoder = TinyDecoder.load(given.decoder, model.dtype, diffusion)
        self.decoder = decoder or diffusion


class Clocked:
    """An optimizer whose steps are clocked."""

    def __init__(self, optimizer: zero.LocalAdamW | zero.ZeroAdamW, clock: Clock):
        self.backward, self._optimizer, self._clock = optimizer.backward, optimizer, clock

    def step(self) -> torch.Tensor | float | None:
        with self._clock("update/optimizer"):
            return self._optimizer.step()


def roll(
    models: Ours, prompts: Sequence[str], rng: torch.Generator, clock: Clock = nullcontext
) -> tuple[Conditioning, PreferencePairs]:
    """What the models know of the prompts, and the pairs of a rollout.

    Prompts are encoded here, as if none came twice in a run; train.py encodes each once, before the loop.
    """
    given = models.config.rollout
    with clock("text"):
        cond = Embeddings(models.diffusion, models.judge, [list(prompts)])[prompts]
    with models.policy.sampling(cond, given.text_kv) as known:
        made = rollout(models.policy, models.decoder, models.judge, models.schedule, known, given, rng, clock)
    return cond, made.pairs


def iteration(
    models: Ours,
    prompts: Sequence[str],
    rng: torch.Generator,
    shuffle: torch.Generator,
    clock: Clock = nullcontext,
) -> PreferencePairs:
    """Rollout, shuffle and all passes over the pairs, which are returned, shuffled."""
    cond, pairs = roll(models, prompts, rng, clock)
    with clock("update"):
        pairs = balance(pairs, len(prompts), models.ranks, shuffle)
        optimizer = Clocked(models.optimizer, clock)
        given = models.policy, models.schedule, optimizer, models.config.optim, shuffle, models.metrics
        learn(pairs, models.forks, cond, *given)
    return pairs
