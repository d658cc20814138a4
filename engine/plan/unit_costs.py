"""Measures operations and memory of one row of each network on the meta device, with the functions of a run.

Both are proportional to the number of rows, which tests/plan/test_unit_costs.py checks, so that one row is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config.methods.spo import SPOOptimConfig
from ..judge.find import AnyJudge
from ..judge.latent import LatentJudge
from ..methods.spo.pairs import PreferencePairs
from ..methods.spo.update import Learner, MicroBatch
from ..models.conditioning import Conditioning
from ..models.guided_unet import Savings
from ..models.latent_diffusion import BATCH, LatentDiffusion
from ..models.policy import Policy
from ..models.tiny_decoder import TinyDecoder
from ..speed.apply import remove_idle_work
from .meta_models import ModelBuilder
from .meter import Flops, Measurement, checkpointed, measure


@dataclass(frozen=True, slots=True)
class UNetCosts:
    """Costs of the UNet by row; a guided latent is two rows.

    Flops of the rollout: `guided`, a row of a guided forward; `unguided`, a row of a forward without guidance; text_kv,
    the keys and values of a prompt; merge, adding the LoRA to the weights, once a rollout. The three that end in _base
    are those of the UNet without its LoRA. Flops of the update: `reference` and `forward`, a forward without and with
    the LoRA; `train`, forward and backward with it; `recompute`, what gradient checkpointing adds. Bytes: forward_peak
    and text_kv_bytes of the rollout; merged_bytes of the weights into which the LoRA is merged; update_peak of an
    update, and checkpointed_peak with gradient checkpointing.
    """

    guided: Flops
    guided_base: Flops
    unguided: Flops
    unguided_base: Flops
    text_kv: Flops
    text_kv_base: Flops
    merge: Flops
    reference: Flops
    forward: Flops
    train: Flops
    recompute: Flops
    forward_peak: float
    text_kv_bytes: float
    merged_bytes: float
    update_peak: float
    checkpointed_peak: float


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Costs of one row of every network.

    unet: under the keys of this recipe; published_unet: of the UNet as loaded, where no text is cached. By latent:
    decode in the rollout, evaluation_decode, and decode_published, where upsampling is not folded. By image: encode, by
    the VAE; judge, whatever it reads; and published_judge, SPO's, with its modulation. By prompt: text, judge_text and
    published_judge_text. Bytes: the peaks of one row, those of the texts of a batch; image_bytes, of a decoded latent;
    weights. auditor: None where the recipe has none.
    """

    unet: UNetCosts
    published_unet: UNetCosts
    decode: Flops
    decode_peak: float
    evaluation_decode: Flops
    evaluation_decode_peak: float
    decode_published: Flops
    image_bytes: float
    encode: Flops
    encode_peak: float
    judge: Flops
    judge_peak: float
    published_judge: Flops
    text: Flops
    text_peak: float
    judge_text: Flops
    judge_text_peak: float
    published_judge_text: Flops
    weights: Weights
    auditor: AuditorCosts | None = None


@dataclass(frozen=True, slots=True)
class AuditorCosts:
    """Costs of an auditor, as a judge's: FLOPs of an image and of a prompt, and bytes."""

    score: Flops
    peak: float
    text: Flops
    text_peak: float
    weights: int
    text_weights: int


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


def unit_costs(builder: ModelBuilder, networks: Networks) -> UnitCosts:
    """Measures each network on one row, as loaded and then after speed/apply.py, which changes `networks`."""
    config, shape = builder.config, builder.latent_shape
    tf32 = config.model.uses_tf32
    published_unet = unet_costs(builder, networks.policy, modes=(False,), as_published=True)
    decode_published = measure_decode(networks.diffusion, shape, tf32).flops
    remove_idle_work(networks.policy.unet, networks.diffusion.vae, config.model.fold_upsample)
    image = torch.empty(1, 3, *builder.size, device="meta", dtype=builder.vae_dtype)
    return UnitCosts(
        **resolution_costs(builder, networks),
        published_unet=published_unet,
        decode_published=decode_published,
        **judge_costs(builder, networks.judge, image),
        **text_costs(networks.diffusion, tf32),
        weights=weight_bytes(networks),
        auditor=auditor_costs(builder.for_auditor(), image) if config.auditor else None,
    )


def resized_costs(builder: ModelBuilder, networks: Networks, costs: UnitCosts) -> UnitCosts:
    """Returns `costs` at the resolution of `builder`; those of the published code are not measured again."""
    networks.policy.latent_shape = builder.latent_shape
    modes = (builder.config.model.gradient_checkpointing,)
    return replace(costs, **resolution_costs(builder, networks, modes))


def resolution_costs(
    builder: ModelBuilder, networks: Networks, modes: Sequence[bool] = (False, True)
) -> dict[str, UNetCosts | Flops | float]:
    """Returns the fields of UnitCosts that depend on the resolution. modes: as for unet_costs."""
    shape, tiny, tf32 = builder.latent_shape, networks.tiny, builder.config.model.uses_tf32
    evaluation = measure_decode(networks.diffusion, shape, tf32)
    decode = measure_decode(tiny, shape, tf32) if tiny else evaluation
    image = torch.empty(3, *builder.size, device="meta", dtype=builder.dtype if tiny else builder.vae_dtype)
    encode = measure(lambda: networks.diffusion.posterior(image[None, None]), tf32)
    return {
        "unet": unet_costs(builder, networks.policy, modes),
        "decode": decode.flops,
        "decode_peak": decode.peak,
        "evaluation_decode": evaluation.flops,
        "evaluation_decode_peak": evaluation.peak,
        "image_bytes": image.nbytes,
        "encode": encode.flops,
        "encode_peak": encode.peak,
    }


def unet_costs(
    builder: ModelBuilder, policy: Policy, modes: Sequence[bool] = (False, True), as_published: bool = False
) -> UNetCosts:
    """Measures a policy on one row. as_published: no text is cached, no LoRA merged and no half shared.

    modes: for each measurement of an update, whether it has gradient checkpointing. After (False, True), `recompute` is
    the difference of the two; with one mode it is 0, and `train` is all that this mode computes.
    """
    config, cond = builder.config, builder.conditioning(1)
    x = torch.empty(1, *builder.latent_shape, device="meta")
    cache_text = config.text_kv and not as_published
    model = config.model
    policy.savings = Savings() if as_published else Savings(None, model.merges_lora, model.share_halves)
    merge, text_kv, guided, unguided = measure_sampling(policy, x, cond, cache_text, model.uses_tf32)
    with policy.reference():
        _, text_kv_base, guided_base, unguided_base = measure_sampling(policy, x, cond, cache_text, model.uses_tf32)
    forward = measure(torch.no_grad()(lambda: policy.eps(x, _t(), cond, config.guided_update)), model.uses_tf32)
    row = guided_base.flops * 0.5 if config.guided_update else unguided_base.flops
    reference = row + text_kv_base.flops * 0.5  # in the update, each row computes its own keys and values
    updates = [measure_update(builder, policy, x, cond, checkpointing) for checkpointing in modes]
    (first, rows), (last, _) = updates[0], updates[-1]
    return UNetCosts(
        guided=guided.flops * 0.5,
        guided_base=guided_base.flops * 0.5,
        unguided=unguided.flops,
        unguided_base=unguided_base.flops,
        text_kv=text_kv.flops * 0.5,
        text_kv_base=text_kv_base.flops * 0.5,
        merge=merge.flops,
        reference=reference,
        forward=forward.flops * (0.5 if config.guided_update else 1),
        train=first.flops * (1 / rows) - reference,
        recompute=(last.flops - first.flops) * (1 / rows),
        forward_peak=guided.peak / 2,
        text_kv_bytes=text_kv.peak / 2,
        merged_bytes=merge.peak,
        update_peak=first.peak / rows,
        checkpointed_peak=last.peak / rows,
    )


def measure_sampling(
    policy: Policy, x: Tensor, cond: Conditioning, cache_text: bool, tf32: bool = False
) -> tuple[Measurement, Measurement, Measurement, Measurement]:
    """Measures four things: merging the LoRA; the keys and values of two prompts, the one of `cond` and the empty one;
    a guided forward of x (1, C, h, w), which is two rows; and one without guidance, which is one row."""
    with ExitStack() as stack:
        merge = measure(lambda: stack.enter_context(policy.sampling(cond, text_kv=False)), tf32)
    with ExitStack() as stack:
        conds = []
        entering = measure(lambda: conds.append(stack.enter_context(policy.sampling(cond, cache_text))), tf32)
        guided = measure(lambda: policy.eps(x, _t(), conds[0]), tf32)
        unguided = measure(lambda: policy.eps(x, _t(), conds[0], guided=False), tf32)
    text_kv = Measurement(entering.flops - merge.flops, entering.peak - merge.peak)
    return merge, text_kv, guided, unguided


def measure_update(
    builder: ModelBuilder, policy: Policy, x: Tensor, cond: Conditioning, checkpointing: bool
) -> tuple[Measurement, int]:
    """Measures the update by one pair whose winner and loser share x (1, C, h, w); gradients are allocated before.

    Returns (measurement, rows of the UNet).
    """
    if checkpointing:
        policy.unet.enable_gradient_checkpointing(checkpointed)
    else:
        policy.unet.disable_gradient_checkpointing()
    for parameter in policy.parameters:
        parameter.grad = torch.empty_like(parameter)
    schedule, config = builder.schedule("meta"), builder.config
    optim = SPOOptimConfig(guided=config.guided_update)  # other methods' losses take as much, beside a UNet
    zero = torch.zeros(1, dtype=torch.int64, device="meta")
    pair = PreferencePairs(x.unsqueeze(0), x.expand(2, *x.shape).clone(), zero, zero, zero.bool())
    learner, batch = Learner(policy, schedule, optim), MicroBatch(pair, 1, cond)
    measurement = measure(lambda: learner.loss(batch)[0].backward(), config.model.uses_tf32)
    return measurement, 2 if config.guided_update else 1


def measure_decode(
    decoder: LatentDiffusion | TinyDecoder, latent_shape: tuple[int, int, int], tf32: bool = False
) -> Measurement:
    """Returns the FLOPs and the peak memory of decoding one latent."""
    return measure(lambda: decoder.decode(torch.empty(1, *latent_shape, device="meta")), tf32)


def judge_costs(builder: ModelBuilder, judge: AnyJudge, image: Tensor) -> dict[str, Flops | float]:
    """Returns the fields of UnitCosts for judging what is shown as the image (1, 3, H, W), and for its prompts."""
    tf32, prompts = builder.config.model.uses_tf32, [""] * BATCH
    pixel = builder.pixel_judge() if isinstance(judge, LatentJudge) else judge
    modulations = []
    modulate = lambda: modulations.append(pixel.clip.modulation(_t()) if pixel.clip.modulated else None)
    modulation = measure(modulate, tf32)
    with torch.no_grad():
        score = tower = measure(lambda: pixel.clip.tower(pixel.pixels(image), modulations[0]), tf32)
        text = published_text = measure(lambda: pixel.encode(prompts), tf32)
        if isinstance(judge, LatentJudge):
            cond = builder.conditioning(1).to(builder.judge_dtype)
            x = torch.empty(1, *builder.latent_shape, device="meta")
            score = measure(lambda: judge.network.image_features(x, _t(), cond, judge.guidance), tf32)
            text = measure(lambda: judge.encode(prompts), tf32)
    return {
        "judge": score.flops,
        "judge_peak": score.peak,
        "judge_text": text.flops * (1 / BATCH),
        "judge_text_peak": text.peak,
        "published_judge": tower.flops + modulation.flops,
        "published_judge_text": published_text.flops * (1 / BATCH),
    }


def auditor_costs(builder: ModelBuilder, image: Tensor) -> AuditorCosts:
    """Measures an auditor as `judge_costs` does a judge. builder: that of the recipe with the auditor as its judge."""
    judge = builder.judge()
    text, costs = _bytes(*judge.text_networks), judge_costs(builder, judge, image)
    measured = (costs[name] for name in ("judge", "judge_peak", "judge_text", "judge_text_peak"))
    return AuditorCosts(*measured, weights=_bytes(judge.network) - text, text_weights=text)


def text_costs(diffusion: LatentDiffusion, tf32: bool = False) -> dict[str, Flops | float]:
    """Returns the fields of UnitCosts for the text encoders: FLOPs of one prompt, peak of BATCH of them."""
    text = measure(lambda: diffusion.encode([""] * BATCH), tf32)
    encoded = BATCH + (not diffusion.zero_null)
    return {"text": text.flops * (1 / encoded), "text_peak": text.peak}


def weight_bytes(networks: Networks) -> Weights:
    """Returns the bytes of the networks as they are now."""
    policy, vae, judge, tiny = networks.policy, networks.diffusion.vae, networks.judge, networks.tiny
    decoder, judge_text = _bytes(vae.decoder, vae.post_quant_conv), _bytes(*judge.text_networks)
    return Weights(
        unet=_bytes(policy.unet) - sum(p.nbytes for p in policy.parameters),
        vae_decoder=decoder,
        vae_encoder=_bytes(vae) - decoder,
        tiny_decoder=_bytes(tiny.network) if tiny else 0,
        text_encoders=_bytes(*networks.diffusion.text_encoders),
        judge=_bytes(judge.network) - judge_text,
        judge_text=judge_text,
        lora=sum(p.numel() for p in policy.parameters),
    )


def _bytes(*networks: nn.Module) -> int:
    return sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))


def _t() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device="meta")
