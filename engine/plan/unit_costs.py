"""Measures operations and memory of one row of each network on the meta device, with the functions of a run.

Both are proportional to the number of rows, which tests/plan/test_unit_costs.py checks, so that one row is enough. Of
the UNet, one measurement holds for all resolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from math import prod

import torch
from torch import Tensor, nn

from ..config.methods.spo import SPOOptimConfig
from ..judge.find import AnyJudge
from ..judge.latent import LatentJudge
from ..judge.model import StepAwarePreferenceModel
from ..methods.spo.pairs import PreferencePairs
from ..methods.spo.update import Learner, MicroBatch
from ..models.guided_unet import NO_SAVINGS, Savings
from ..models.latent_diffusion import BATCH, LatentDiffusion
from ..models.policy import Policy
from ..models.tiny_decoder import TinyDecoder
from ..speed.apply import remove_idle_work
from .meta_models import ModelBuilder
from .meter import Flops, Measurement, checkpointed, measure, measure_by_size

SIDES = 127, 131  # of a latent where the UNet has halved it; no other dimension of its tensors is a multiple of both


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of each network's parameters and buffers. lora: how many numbers are trained."""

    unet: int
    vae_decoder: int
    vae_encoder: int
    tiny_decoder: int
    text_encoders: int
    judge: int
    judge_text: int
    lora: int


@dataclass(frozen=True, slots=True)
class Networks:
    """A recipe's networks on the meta device. tiny: the rollout's decoder, where the recipe names one."""

    policy: Policy
    diffusion: LatentDiffusion
    judge: AnyJudge
    tiny: TinyDecoder | None

    @classmethod
    def of(cls, builder: ModelBuilder) -> Networks:
        return cls(builder.policy(), builder.diffusion(), builder.judge(), builder.decoder())

    def weights(self) -> Weights:
        """Returns the bytes of the networks as they are now."""
        policy, vae, judge = self.policy, self.diffusion.vae, self.judge
        decoder, judge_text = _bytes(vae.decoder, vae.post_quant_conv), _bytes(*judge.text_networks)
        return Weights(
            unet=_bytes(policy.unet) - sum(p.nbytes for p in policy.parameters),
            vae_decoder=decoder,
            vae_encoder=_bytes(vae) - decoder,
            tiny_decoder=_bytes(self.tiny.network) if self.tiny else 0,
            text_encoders=_bytes(*self.diffusion.text_encoders),
            judge=_bytes(judge.network) - judge_text,
            judge_text=judge_text,
            lora=sum(p.numel() for p in policy.parameters),
        )


def once(measured: Callable) -> Callable:
    """Makes a method of UNetCosts measure once for all resolutions, and return the Measurement at that of its costs."""

    @wraps(measured)
    def known(self: UNetCosts, *args: bool) -> Measurement:
        key = measured.__name__, *args
        if key not in self.known:
            self.known[key] = measured(self, *args)
        return self.known[key](self.pixels)

    return known


@dataclass(frozen=True, slots=True)
class UNetCosts:
    """Costs of the UNet under the keys of a recipe, measured when they are asked for.

    builder: has the resolution of the costs; known: what has been measured, as functions of it.
    """

    builder: ModelBuilder
    policy: Policy
    known: dict[tuple, Callable[[int], Measurement]] = field(default_factory=dict)

    def sampled(self, guided: bool = True) -> Measurement:
        """Costs a row of the rollout's forwards; a guided latent is two rows."""
        return self._sampled(guided) * (0.5 if guided else 1)

    def sampled_base(self, guided: bool) -> Flops:
        """Operations of such a row without the LoRA."""
        return self.predicted(guided, False) - self.text_kv(False).flops

    def predicted(self, guided: bool, lora: bool) -> Flops:
        """Operations of a row of a forward that computes its own keys and values of the text, and no gradients."""
        return self._predicted(guided, lora).flops * (0.5 if guided else 1)

    @property
    def merge(self) -> Measurement:
        """Merging the LoRA into the weights, once a rollout; the bytes are those of the weights as they were."""
        return self._entered(False, True)

    def text_kv(self, lora: bool = True) -> Measurement:
        """Keys and values of a prompt, where the recipe computes them once a rollout."""
        return (self._entered(self.builder.config.text_kv, lora) - self._entered(False, lora)) * 0.5

    @property
    def reference(self) -> Flops:
        """Operations of a row of the update that the reference predicts."""
        return self.predicted(self.builder.config.guided_update, False)

    @property
    def forward(self) -> Flops:
        """Operations of a row of the update that the policy predicts without gradients."""
        return self.predicted(self.builder.config.guided_update, True)

    @property
    def train(self) -> Flops:
        """Operations of a row of the update that the policy learns from, forward and backward."""
        return self.update(False).flops - self.reference

    @property
    def recompute(self) -> Flops:
        """Operations that gradient checkpointing adds to such a row."""
        return self.update(True).flops - self.update(False).flops

    def update(self, checkpointing: bool) -> Measurement:
        """A row of the update in policy and reference, with gradient checkpointing or without."""
        return self._updated(checkpointing) * (0.5 if self.builder.config.guided_update else 1)

    def unsaved(self) -> tuple[Flops, Flops, Flops]:
        """Operations of a row of a policy without savings: a forward, one of the reference, a forward and backward."""
        x, cond, predicted = self._x(), self.builder.conditioning(1), []
        forward = self._measured(lambda: predicted.append(self.policy.eps(x, _t(), cond, guided=False)))
        backward = self._measured(lambda: predicted.pop().sum().backward())
        forward, backward = (measured(self.pixels).flops for measured in (forward, backward))
        return forward, self.predicted(False, False), forward + backward

    @property
    def pixels(self) -> int:
        """Pixels of a latent where the UNet has halved it as often as it does."""
        return prod(side // self.builder.multiple for side in self.builder.latent_shape[1:])

    @once
    def _sampled(self, guided: bool) -> Callable[[int], Measurement]:
        x = self._x()
        with self.policy.sampling(self.builder.conditioning(1), self.builder.config.text_kv) as cond:
            return self._measured(lambda: self.policy.eps(x, _t(), cond, guided))

    @once
    def _predicted(self, guided: bool, lora: bool) -> Callable[[int], Measurement]:
        x, cond = self._x(), self.builder.conditioning(1)
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
        x, zero = self._x(), torch.zeros(1, dtype=torch.int64, device="meta")
        pair = PreferencePairs(x.unsqueeze(0), x.expand(2, *x.shape).clone(), zero, zero, zero.bool())
        batch = MicroBatch(pair, 1, self.builder.conditioning(1))
        measured = self._measured(lambda: learner.loss(batch)[0].backward())
        policy.unet.disable_gradient_checkpointing()
        return measured

    def _x(self) -> Tensor:
        """Returns a latent (1, C, h, w) of SIDES."""
        multiple = self.builder.multiple
        return torch.empty(1, self.builder.latent_shape[0], *(multiple * side for side in SIDES), device="meta")

    def _measured(self, work: Callable[[], object]) -> Callable[[int], Measurement]:
        return measure_by_size(work, prod(SIDES), self.builder.config.model.uses_tf32)


@dataclass(frozen=True, slots=True)
class PublishedCosts:
    """Operations of SPO's published code, which runs the networks as they are loaded.

    By row of the UNet: forward, reference, and train, forward and backward. By latent: decode. By image: judge, with
    its modulation. By prompt: judge_text.
    """

    forward: Flops
    reference: Flops
    train: Flops
    decode: Flops
    judge: Flops
    judge_text: Flops


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Costs of one row of every network under the keys of a recipe.

    By latent: decode in the rollout, and evaluation_decode. By image: encode, by the VAE, and judge, whatever it reads.
    By prompt, but for the bytes, which are of BATCH prompts: text and judge_text. image_bytes: of a decoded latent.
    published: None where it was not asked for.
    """

    unet: UNetCosts
    decode: Measurement
    evaluation_decode: Measurement
    image_bytes: float
    encode: Measurement
    judge: Measurement
    judge_text: Measurement
    text: Measurement
    weights: Weights
    published: PublishedCosts | None


def unit_costs(builder: ModelBuilder, networks: Networks, published: bool = False) -> UnitCosts:
    """Measures each network on one row after speed/apply.py, which changes `networks`. published: as they are, too."""
    model, judge = builder.config.model, networks.judge
    published_costs = _published_costs(builder, networks) if published else None
    remove_idle_work(networks.policy.unet, networks.diffusion.vae, model.fold_upsample)
    networks.policy.savings = Savings(None, model.merges_lora, model.share_halves)
    score, judge_text = (
        _latent_judge(builder, judge) if isinstance(judge, LatentJudge) else _pixel_judge(builder, judge)[1:]
    )
    text = measure(lambda: networks.diffusion.encode([""] * BATCH), model.uses_tf32)
    encoded = BATCH + (not networks.diffusion.zero_null)
    return UnitCosts(
        unet=UNetCosts(builder, networks.policy),
        **_vae_costs(builder, networks),
        judge=score,
        judge_text=judge_text,
        text=Measurement(text.flops * (1 / encoded), text.peak),
        weights=networks.weights(),
        published=published_costs,
    )


def resized_costs(builder: ModelBuilder, networks: Networks, costs: UnitCosts) -> UnitCosts:
    """Returns `costs` at the resolution of `builder`; those of judge and published code stay what they are."""
    return replace(costs, unet=replace(costs.unet, builder=builder), **_vae_costs(builder, networks))


def measure_decode(decoder: LatentDiffusion | TinyDecoder, builder: ModelBuilder) -> Measurement:
    """Measures the decoding of one latent."""
    tf32, shape = builder.config.model.uses_tf32, builder.latent_shape
    return measure(lambda: decoder.decode(torch.empty(1, *shape, device="meta")), tf32)


def _vae_costs(builder: ModelBuilder, networks: Networks) -> dict[str, Measurement | float]:
    """Returns the fields of UnitCosts for what encodes and decodes images."""
    tiny, diffusion = networks.tiny, networks.diffusion
    evaluation = measure_decode(diffusion, builder)
    image = torch.empty(3, *builder.size, device="meta", dtype=builder.dtype if tiny else builder.vae_dtype)
    return {
        "decode": measure_decode(tiny, builder) if tiny else evaluation,
        "evaluation_decode": evaluation,
        "image_bytes": image.nbytes,
        "encode": measure(lambda: diffusion.posterior(image[None, None]), builder.config.model.uses_tf32),
    }


@torch.no_grad()
def _pixel_judge(
    builder: ModelBuilder, judge: StepAwarePreferenceModel
) -> tuple[Measurement, Measurement, Measurement]:
    """Measures the modulation, the score of an image without it, and the encoding of a prompt."""
    tf32, clip, modulations = builder.config.model.uses_tf32, judge.clip, []
    image = torch.empty(1, 3, *builder.size, device="meta", dtype=builder.vae_dtype)
    modulation = measure(lambda: modulations.append(clip.modulation(_t()) if clip.modulated else None), tf32)
    tower = measure(lambda: clip.tower(judge.pixels(image), modulations[0]), tf32)
    return modulation, tower, _prompt(judge, tf32)


@torch.no_grad()
def _latent_judge(builder: ModelBuilder, judge: LatentJudge) -> tuple[Measurement, Measurement]:
    """Measures the score of a latent and the encoding of a prompt."""
    tf32, cond = builder.config.model.uses_tf32, builder.conditioning(1)
    x = torch.empty(1, *builder.latent_shape, device="meta")
    return measure(lambda: judge.network.image_features(x, _t(), cond, judge.guidance), tf32), _prompt(judge, tf32)


def _prompt(judge: AnyJudge, tf32: bool) -> Measurement:
    text = measure(lambda: judge.encode([""] * BATCH), tf32)
    return Measurement(text.flops * (1 / BATCH), text.peak)


def _published_costs(builder: ModelBuilder, networks: Networks) -> PublishedCosts:
    """Measures networks to which speed/apply.py has done nothing yet."""
    networks.policy.savings, judge = NO_SAVINGS, networks.judge
    judge = builder.pixel_judge() if isinstance(judge, LatentJudge) else judge
    modulation, score, judge_text = _pixel_judge(builder, judge)
    return PublishedCosts(
        *UNetCosts(builder, networks.policy).unsaved(),
        decode=measure_decode(networks.diffusion, builder).flops,
        judge=score.flops + modulation.flops,
        judge_text=judge_text.flops,
    )


def _bytes(*networks: nn.Module) -> int:
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _t() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")
