"""What one row of each network costs: operations and memory, measured on the meta device with the functions of a run.

Both grow with the number of rows and with nothing else, so that one row tells of all. That it is so holds a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..judge.model import StepAwarePreferenceModel
from ..methods.spo.pairs import PreferencePairs
from ..methods.spo.update import Learner, MicroBatch
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import BATCH, LatentDiffusion
from ..models.policy import Policy, Savings
from ..models.tiny_decoder import TinyDecoder
from ..speed.apply import make_lean
from .meta_models import Blueprint
from .meter import Flops, Reading, checkpointed, gauge


@dataclass(frozen=True, slots=True)
class UNetPrices:
    """Of one row of the UNet, where a guided latent is two.

    sample: a forward of a rollout, guided; alone: one that has one half alone; keep: keys and values of a prompt; all
    without the LoRA: sample_base, alone_base and keep_base. merge: adding the LoRA to the weights, once a rollout.
    reference: a forward of the update without the LoRA; train: forward and backward with it; recompute: what gradient
    checkpointing adds. Bytes: sample_peak of a forward, kept of a prompt's keys and values, merged of the weights
    beside which the LoRA is merged, update_peak of an update, and checkpointed_peak.
    """

    sample: Flops
    sample_base: Flops
    alone: Flops
    alone_base: Flops
    keep: Flops
    keep_base: Flops
    merge: Flops
    reference: Flops
    train: Flops
    recompute: Flops
    sample_peak: float
    kept: float
    merged: float
    update_peak: float
    checkpointed_peak: float


@dataclass(frozen=True, slots=True)
class Prices:
    """unet: with the keys of this recipe; published: of the UNet as it came and no text kept.

    Of one latent: decode of the rollout, evaluated of the evaluation and, with upsampling as it came, decode_published.
    Of one image: judge, and modulation, which the judge makes of a timestep. Of one prompt: text and judge_text. Bytes:
    peaks of one of each, of text those of a batch; image, which a latent is decoded to; weights of each network.
    """

    unet: UNetPrices
    published: UNetPrices
    decode: Flops
    decode_peak: float
    evaluated: Flops
    evaluated_peak: float
    decode_published: Flops
    image: float
    judge: Flops
    judge_peak: float
    modulation: Flops
    text: Flops
    text_peak: float
    judge_text: Flops
    judge_text_peak: float
    weights: Weights


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of each network's parameters and buffers; lora: how many numbers are trained."""

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
    """A recipe's, on the meta device; tiny: the rollout's decoder where it is another than the VAE's."""

    policy: Policy
    diffusion: LatentDiffusion
    judge: StepAwarePreferenceModel
    tiny: TinyDecoder | None

    @classmethod
    def of(cls, blueprint: Blueprint) -> Networks:
        return cls(blueprint.policy(), blueprint.diffusion(), blueprint.judge(), blueprint.decoder())


def prices(blueprint: Blueprint, networks: Networks) -> Prices:
    """Lets each of the networks do its work on one row, as they came and then as speed/apply.py leaves them."""
    config, shape = blueprint.config, blueprint.latent_shape
    tf32 = config.model.uses_tf32
    published = unet_prices(blueprint, networks.policy, modes=(False,), as_published=True)
    as_it_came = decoding(networks.diffusion, shape, tf32)
    make_lean(networks.policy.unet, networks.diffusion.vae, config.model.fold_upsample)
    image = torch.empty(1, 3, *blueprint.size, device="meta", dtype=blueprint.vae_dtype)
    return Prices(
        **of_sampling(blueprint, networks),
        published=published,
        decode_published=as_it_came.flops,
        **of_judge(networks.judge, image, tf32),
        **of_text(networks.diffusion, networks.judge, tf32),
        weights=weigh(networks),
    )


def resized(blueprint: Blueprint, networks: Networks, price: Prices) -> Prices:
    """Prices at the resolution of `blueprint`, made of those at another; published ones stay as they were."""
    networks.policy.latent_shape = blueprint.latent_shape
    modes = (blueprint.config.model.gradient_checkpointing,)
    return replace(price, **of_sampling(blueprint, networks, modes))


def of_sampling(
    blueprint: Blueprint, networks: Networks, modes: Sequence[bool] = (False, True)
) -> dict[str, UNetPrices | Flops | float]:
    """The fields of Prices that depend on the resolution; modes: as for unet_prices."""
    shape, tiny, tf32 = blueprint.latent_shape, networks.tiny, blueprint.config.model.uses_tf32
    evaluated = decoding(networks.diffusion, shape, tf32)
    decode = decoding(tiny, shape, tf32) if tiny else evaluated
    image = torch.empty(3, *blueprint.size, device="meta", dtype=blueprint.dtype if tiny else blueprint.vae_dtype)
    return {
        "unet": unet_prices(blueprint, networks.policy, modes),
        "decode": decode.flops,
        "decode_peak": decode.peak,
        "evaluated": evaluated.flops,
        "evaluated_peak": evaluated.peak,
        "image": image.nbytes,
    }


def unet_prices(
    blueprint: Blueprint, policy: Policy, modes: Sequence[bool] = (False, True), as_published: bool = False
) -> UNetPrices:
    """Those of a policy as it is. as_published: no text kept, no LoRA merged and no half shared.

    modes: of the update, whether with gradient checkpointing. Of two the second says what is recomputed; of one alone
    `train` has all that there is.
    """
    config, cond = blueprint.config, blueprint.conditioning(1)
    x = torch.empty(1, *blueprint.latent_shape, device="meta")
    text_kv = config.rollout.text_kv and not as_published
    model = config.model
    policy.savings = Savings() if as_published else Savings(None, model.merges_lora, model.share_halves)
    merge, keep, sample, alone = sampling(policy, x, cond, text_kv, model.uses_tf32)
    with policy.reference():
        _, keep_base, base, alone_base = sampling(policy, x, cond, text_kv, config.model.uses_tf32)
    row = base.flops * 0.5 if config.guided_update else alone_base.flops
    reference = row + keep_base.flops * 0.5  # in the update, a row makes its own keys and values
    updates = [updating(blueprint, policy, x, cond, checkpointing) for checkpointing in modes]
    (plain, rows), (again, _) = updates[0], updates[-1]
    return UNetPrices(
        sample=sample.flops * 0.5,
        sample_base=base.flops * 0.5,
        alone=alone.flops,
        alone_base=alone_base.flops,
        keep=keep.flops * 0.5,
        keep_base=keep_base.flops * 0.5,
        merge=merge.flops,
        reference=reference,
        train=plain.flops * (1 / rows) - reference,
        recompute=(again.flops - plain.flops) * (1 / rows),
        sample_peak=sample.peak / 2,
        kept=keep.peak / 2,
        merged=merge.peak,
        update_peak=plain.peak / rows,
        checkpointed_peak=again.peak / rows,
    )


def sampling(policy: Policy, x: Tensor, cond: Conditioning, text_kv: bool, tf32: bool = False) -> tuple[Reading, ...]:
    """Of merging the LoRA; of keeping the text of `cond`, which is two with the empty prompt; of a forward of
    x (1, C, h, w), two rows; of one without guidance, one row."""
    with ExitStack() as stack:
        merge = gauge(lambda: stack.enter_context(policy.sampling(cond, text_kv=False)), tf32)
    with ExitStack() as stack:
        known = []
        both = gauge(lambda: known.append(stack.enter_context(policy.sampling(cond, text_kv))), tf32)
        forward = gauge(lambda: policy.eps(x, _t(), known[0]), tf32)
        alone = gauge(lambda: policy.eps(x, _t(), known[0], guided=False), tf32)
    return merge, Reading(both.flops - merge.flops, both.peak - merge.peak), forward, alone


def updating(
    blueprint: Blueprint, policy: Policy, x: Tensor, cond: Conditioning, checkpointing: bool
) -> tuple[Reading, int]:
    """(of an update by one pair that shares x (1, C, h, w); its rows in the UNet). Gradients are there already."""
    if checkpointing:
        policy.unet.enable_gradient_checkpointing(checkpointed)
    else:
        policy.unet.disable_gradient_checkpointing()
    for parameter in policy.parameters:
        parameter.grad = torch.empty_like(parameter)
    schedule, config = blueprint.schedule("meta"), blueprint.config
    zero = torch.zeros(1, dtype=torch.int64, device="meta")
    pair = PreferencePairs(x.unsqueeze(0), x.expand(2, *x.shape).clone(), zero, zero, zero.bool())
    learner, batch = Learner(policy, schedule, config.optim), MicroBatch(pair, 1, cond)
    reading = gauge(lambda: learner.loss(batch)[0].backward(), config.model.uses_tf32)
    return reading, 2 if config.guided_update else 1


def decoding(decoder: LatentDiffusion | TinyDecoder, latent_shape: tuple[int, int, int], tf32: bool = False) -> Reading:
    """Of one latent."""
    return gauge(lambda: decoder.decode(torch.empty(1, *latent_shape, device="meta")), tf32)


def of_judge(judge: StepAwarePreferenceModel, image: Tensor, tf32: bool = False) -> dict[str, Flops | float]:
    """Of one image (1, 3, H, W), for the fields of Prices."""
    made = []
    modulation = gauge(lambda: made.append(judge.clip.modulation(_t()) if judge.clip.modulated else None), tf32)
    with torch.no_grad():
        tower = gauge(lambda: judge.clip.tower(judge.pixels(image), made[0]), tf32)
    return {"judge": tower.flops, "judge_peak": tower.peak, "modulation": modulation.flops}


def of_text(
    diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, tf32: bool = False
) -> dict[str, Flops | float]:
    """Of one prompt, and the peaks of a batch of them, for the fields of Prices."""
    prompts = [""] * BATCH
    text = gauge(lambda: diffusion.encode(prompts), tf32)
    with torch.no_grad():
        judge_text = gauge(lambda: judge.encode(prompts), tf32)
    encoded = BATCH + (not diffusion.zero_null)
    return {
        "text": text.flops * (1 / encoded),
        "text_peak": text.peak,
        "judge_text": judge_text.flops * (1 / BATCH),
        "judge_text_peak": judge_text.peak,
    }


def weigh(networks: Networks) -> Weights:
    """Of networks as they are."""
    policy, vae, clip, tiny = networks.policy, networks.diffusion.vae, networks.judge.clip, networks.tiny
    decoder, judge_text = _bytes(vae.decoder, vae.post_quant_conv), _bytes(clip.text_model, clip.text_projection)
    return Weights(
        unet=_bytes(policy.unet) - sum(p.nbytes for p in policy.parameters),
        vae_decoder=decoder,
        vae_encoder=_bytes(vae) - decoder,
        tiny_decoder=_bytes(tiny.network) if tiny else 0,
        text_encoders=_bytes(*networks.diffusion.text_encoders),
        judge=_bytes(clip) - judge_text,
        judge_text=judge_text,
        lora=sum(p.numel() for p in policy.parameters),
    )


def _bytes(*networks: nn.Module) -> int:
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _t() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")
