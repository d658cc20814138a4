"""Measures operations and memory of one row of each network on the meta device, with the functions of a run.

Both are proportional to the number of rows, which tests/plan/test_unit_costs.py checks, so that one row is enough. Of
UNet and decoder, one measurement holds for all resolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import replace
from functools import wraps
from math import prod

import torch
from torch import Tensor, nn

from ..config.methods.spo import SPOOptimConfig
from ..judge.find import AnyJudge
from ..judge.latent import LatentJudge
from ..methods.spo.pairs import PreferencePairs
from ..methods.spo.update import Learner, MicroBatch
from ..models.guided_unet import Savings
from ..models.latent_diffusion import BATCH
from ..speed.apply import remove_idle_work
from .meta_models import ModelBuilder
from .meter import Flops, Measurement, checkpointed, measure, measure_by_size
from .row_counts import TEXT_ENCODERS, VAE_ENCODER

SIDES = 127, 131  # of a latent where the UNet has halved it; no other dimension of its tensors is a multiple of both


def once(measured: Callable) -> Callable:
    """Makes a method of Costs, which returns measurements by pixels, measure once and return that of its resolution."""

    @wraps(measured)
    def known(self: Costs, *args: bool) -> Measurement:
        key = measured.__name__, *args
        if key not in self.known:
            self.known[key] = measured(self, *args)
        return self.known[key](self.pixels)

    return known


class Costs:
    """Costs of one row of every network under the keys of a recipe; methods measure when they are called first.

    scores, judge_texts: of "judge" and, where there is one, "auditor"; scores by image or latent, whatever it reads.
    text, judge_texts: by prompt, but for the bytes, which are of BATCH prompts. weights: bytes by part, with the LoRA's
    own. published: operations of SPO's published code, which runs the networks as they are loaded: by row of the UNet
    forward, reference and train, decode, judge with its modulation, and judge_text; empty where not asked for.
    """

    def __init__(self, builder: ModelBuilder, published: bool = False):
        """Builds the networks of a recipe, and measures what stays the same at other resolutions."""
        self.builder, self.known, model = builder, {}, builder.config.model
        self.policy, self.diffusion, self.tiny = builder.policy(), builder.diffusion(), builder.decoder()
        judges = {"judge": builder.judge()} | ({"auditor": builder.auditor()} if builder.config.auditor else {})
        self.published = self._published(judges["judge"]) if published else {}
        self.known.clear()  # of networks that now become others
        remove_idle_work(self.policy.unet, self.diffusion.vae, model.fold_upsample)
        self.policy.savings = Savings(None, model.merges_lora, model.share_halves)
        text = measure(lambda: self.diffusion.encode([""] * BATCH), model.uses_tf32)
        self.text = replace(text, flops=text.flops * (1 / (BATCH + (not self.diffusion.zero_null))))
        self.scores = {name: self._score(judge) for name, judge in judges.items()}
        self.judge_texts = {name: self._judge_text(judge) for name, judge in judges.items()}
        self.weights = self._weights(judges)

    def at(self, builder: ModelBuilder) -> Costs:
        """Returns the costs at the resolution of another builder; those of judges and published code stay."""
        resized = copy(self)
        resized.builder = builder
        return resized

    @property
    def pixels(self) -> int:
        """Pixels of a latent where the UNet has halved it as often as it does."""
        return prod(side // self.builder.multiple for side in self.builder.latent_shape[1:])

    def sampled(self, guided: bool = True) -> Measurement:
        """Returns the costs of a row of the rollout's forwards; a guided latent is two rows."""
        return self._sampled(guided) * (0.5 if guided else 1)

    def sampled_base(self, guided: bool) -> Flops:
        """Returns the operations of such a row without the LoRA."""
        return self.predicted(False, guided) - self.text_kv(lora=False).flops

    def text_kv(self, lora: bool = True) -> Measurement:
        """Returns the costs of keys and values of a text, where the recipe computes them once a rollout."""
        return (self._entered(self.builder.config.text_kv, lora) - self._entered(False, lora)) * 0.5

    def merge(self) -> Measurement:
        """Returns the costs of merging the LoRA into the weights once a rollout, the unmerged ones being kept."""
        return self._entered(False, True)

    def predicted(self, lora: bool, guided: bool | None = None) -> Flops:
        """Returns the operations of a row of a forward without gradients that computes keys and values of its text.

        guided: None means as in the update.
        """
        guided = self.builder.config.guided_update if guided is None else guided
        return self._predicted(lora, guided).flops * (0.5 if guided else 1)

    def update(self, checkpointing: bool) -> Measurement:
        """Returns the costs of a row of the update, policy and reference, with gradient checkpointing or without."""
        return self._updated(checkpointing) * (0.5 if self.builder.config.guided_update else 1)

    @once
    def decode(self, evaluation: bool = False) -> Callable[[int], Measurement]:
        """Measures the decoding of a latent, in the rollout or in the evaluation."""
        decoder = self.tiny if self.tiny and not evaluation else self.diffusion
        return self._measured(lambda: decoder.decode(self._latent()))

    def encode(self) -> Measurement:
        """Returns the costs of an image for the VAE, which pads it to an odd size: no measurement holds for another."""
        return self._encoded(*self.builder.size)

    def image_bytes(self) -> int:
        """Returns the bytes of a latent that the rollout has decoded."""
        dtype = self.builder.dtype if self.tiny else self.builder.vae_dtype
        return 3 * prod(self.builder.size) * dtype.itemsize

    @once
    def _sampled(self, guided: bool) -> Callable[[int], Measurement]:
        x = self._latent()
        with self.policy.sampling(self.builder.conditioning(1), self.builder.config.text_kv) as cond:
            return self._measured(lambda: self.policy.eps(x, _t(), cond, guided))

    @once
    def _predicted(self, lora: bool, guided: bool) -> Callable[[int], Measurement]:
        x, cond = self._latent(), self.builder.conditioning(1)
        with torch.no_grad() if lora else self.policy.reference():
            return self._measured(lambda: self.policy.eps(x, _t(), cond, guided))

    @once
    def _entered(self, text_kv: bool, lora: bool) -> Callable[[int], Measurement]:
        sampling = self.policy.sampling(self.builder.conditioning(1), text_kv)
        with nullcontext() if lora else self.policy.reference(), ExitStack() as stack:
            return self._measured(lambda: stack.enter_context(sampling))

    @once
    def _updated(self, checkpointing: bool) -> Callable[[int], Measurement]:
        """Measures the update by one pair whose winner and loser share a latent; gradients are allocated before."""
        policy, guided = self.policy, self.builder.config.guided_update
        if checkpointing:
            policy.unet.enable_gradient_checkpointing(checkpointed)
        for parameter in policy.parameters:
            parameter.grad = torch.empty_like(parameter)
        # other methods' losses take as much, beside a UNet
        learner = Learner(policy, self.builder.schedule("meta"), SPOOptimConfig(guided=guided))
        x, zero = self._latent(), torch.zeros(1, dtype=torch.int64, device="meta")
        pair = PreferencePairs(x.unsqueeze(0), x.expand(2, *x.shape).clone(), zero, zero, zero.bool())
        batch = MicroBatch(pair, 1, self.builder.conditioning(1))
        measured = self._measured(lambda: learner.loss(batch)[0].backward())
        policy.unet.disable_gradient_checkpointing()
        return measured

    @once
    def _encoded(self, height: int, width: int) -> Callable[[int], Measurement]:
        image = torch.empty(1, 1, 3, height, width, device="meta", dtype=self.builder.vae_dtype)
        measured = measure(lambda: self.diffusion.posterior(image), self.builder.config.model.uses_tf32)
        return lambda pixels: measured

    @torch.no_grad()
    def _score(self, judge: AnyJudge) -> Measurement:
        return measure(scoring(self.builder, judge), self.builder.config.model.uses_tf32)

    def _judge_text(self, judge: AnyJudge) -> Measurement:
        text = measure(lambda: judge.encode([""] * BATCH), self.builder.config.model.uses_tf32)
        return replace(text, flops=text.flops * (1 / BATCH))

    def _published(self, judge: AnyJudge) -> dict[str, Flops]:
        """Measures networks to which speed/apply.py has done nothing yet."""
        judge = self.builder.pixel_judge() if isinstance(judge, LatentJudge) else judge
        x, cond, predicted = self._latent(), self.builder.conditioning(1), []
        forward = self._measured(lambda: predicted.append(self.policy.eps(x, _t(), cond, guided=False)))
        backward = self._measured(lambda: predicted.pop().sum().backward())
        modulate = lambda: judge.clip.modulation(_t()) if judge.clip.modulated else None
        return {
            "forward": forward(self.pixels).flops,
            "reference": self.predicted(False, guided=False),
            "train": forward(self.pixels).flops + backward(self.pixels).flops,
            "decode": self.decode(True).flops,
            "judge": self._score(judge).flops + self._measured(modulate)(0).flops,
            "judge_text": self._judge_text(judge).flops,
        }

    def _weights(self, judges: dict[str, AnyJudge]) -> dict[str, int]:
        """Returns the bytes of parameters and buffers."""
        vae, lora = self.diffusion.vae, sum(p.nbytes for p in self.policy.parameters)
        decoder = _bytes(vae.decoder, vae.post_quant_conv)
        bytes_of_judges = {name: _judge_bytes(judge) for name, judge in judges.items()}
        return {
            "UNet": _bytes(self.policy.unet) - lora,
            "VAE decoder": decoder,
            VAE_ENCODER: _bytes(vae) - decoder,
            "tiny decoder": _bytes(self.tiny.network) if self.tiny else 0,
            TEXT_ENCODERS: _bytes(*self.diffusion.text_encoders),
            **{name: scores for name, (scores, _) in bytes_of_judges.items()},
            **{f"{name}'s text encoder": encodes for name, (_, encodes) in bytes_of_judges.items()},
            "LoRA": lora,
        }

    def _latent(self) -> Tensor:
        """Returns a latent (1, C, h, w) of SIDES."""
        channels, multiple = self.builder.latent_shape[0], self.builder.multiple
        return torch.empty(1, channels, *(multiple * side for side in SIDES), device="meta")

    def _measured(self, work: Callable[[], object]) -> Callable[[int], Measurement]:
        return measure_by_size(work, prod(SIDES), self.builder.config.model.uses_tf32)


def scoring(builder: ModelBuilder, judge: AnyJudge) -> Callable[[], Tensor]:
    """Returns what scores one latent, or one image with its modulation known, on the meta device."""
    if isinstance(judge, LatentJudge):
        x = torch.empty(1, *builder.latent_shape, device="meta")
        cond = builder.conditioning(1).to(judge.network.unet.dtype)
        return lambda: judge.network.image_features(x, _t(), cond, judge.guidance)
    image = torch.empty(1, 3, *builder.size, device="meta", dtype=builder.vae_dtype)
    modulation = judge.clip.modulation(_t()) if judge.clip.modulated else None
    return lambda: judge.clip.tower(judge.pixels(image), modulation)


def _judge_bytes(judge: AnyJudge) -> tuple[int, int]:
    """Returns the bytes of what a judge scores with and of its text encoder, but for what is the base model's."""
    if isinstance(judge, LatentJudge) and judge.network.lora_rank:
        return sum(value.nbytes for value in judge.network.own().values()), 0
    text = _bytes(*judge.text_networks)
    return _bytes(judge.network) - text, text


def _bytes(*networks: nn.Module) -> int:
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _t() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")
