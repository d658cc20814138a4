"""What a run holds in a GPU's memory: the parts that stay, and the peak of each phase with what it adds to them.

Tensors are counted as meter.py does. What the context, the allocator's gaps and libraries' workspaces take besides is
RESERVE, an allowance that nobody has measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .communication import FLOAT, pair_bytes
from .meta_models import Blueprint
from .row_counts import Tally
from .unit_costs import Prices

RESERVE = 1.5e9


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. parts: what stays through the training; phases: the most in each, the parts it needs included."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def peak(self) -> float:
        return self.phases[self.peak_phase]


def footprint(blueprint: Blueprint, counted: Tally, price: Prices, ranks: int) -> Footprint:
    """Of one process of so many, each on its own GPU."""
    config, weights = blueprint.config, price.weights
    lora, latent = FLOAT * weights.lora, math.prod(blueprint.latent_shape)
    models = {
        "UNet": weights.unet,
        "VAE decoder": weights.vae_decoder,
        "VAE encoder, which training does not use": weights.vae_encoder,
        **({"tiny decoder": weights.tiny_decoder} if weights.tiny_decoder else {}),
        "judge": weights.judge,
        "LoRA": lora,
    }
    master = lora / ranks if ranks > 1 else 0  # DeepSpeed keeps a copy of what a process updates
    parts = models | {"optimizer state": 2 * lora / ranks + master}
    resident = sum(parts.values())
    pairs = counted.made * pair_bytes(counted, latent)
    gradients = gradient_bytes(config.zero.stage, lora, ranks)
    most, images = counted.most, price.image * counted.most["decode"]
    kept = price.unet.kept * (counted.prompts + 1) + price.unet.merged + pairs
    decode = decoding_bytes(price.decode_peak, price.image, most["decode"], config.model.decode_rows)
    unet_rows = max(most["unet"], most["alone"])
    unet_rows = min(unet_rows, config.model.unet_rows or unet_rows)
    update = price.unet.checkpointed_peak if config.model.gradient_checkpointing else price.unet.update_peak
    towers = weights.text_encoders + weights.judge_text
    phases = {
        "embedding the prompts": sum(models.values()) + towers + max(price.text_peak, price.judge_text_peak),
        "rollout: UNet": resident + kept + price.unet.sample_peak * unet_rows,
        "rollout: decode": resident + kept + decode,
        "rollout: judge": resident + kept + images + price.judge_peak * most["judge"],
        "update": resident + gradients + 2 * pairs + update * update_rows(blueprint, counted),
        "evaluation": resident + evaluation_bytes(blueprint, price),
    }
    if ranks > 1:
        phases["balance of pairs"] = resident + (2 * ranks + 1) * pairs
    return Footprint(parts, phases)


def gradient_bytes(stage: int, lora: float, ranks: int) -> float:
    """Gradients and, of several processes, the bucket in which they travel and a flat copy of it."""
    if ranks == 1:
        return lora
    return (lora if stage == 1 else lora / ranks) + 2 * lora


def update_rows(blueprint: Blueprint, counted: Tally) -> int:
    """Most rows that a micro-batch can put through the UNet: of MSPO, all pairs of one may have two latents."""
    halves = 2 if blueprint.config.guided_update else 1
    return halves * min(blueprint.config.optim.micro_batch, counted.made) * counted.sides


def decoding_bytes(peak: float, image: float, latents: int, at_once: int | None) -> float:
    """Of decoding so many latents, at_once in a forward: what came out of former parts waits to be joined.

    peak: of one latent, image: of what it is decoded to.
    """
    rows = min(latents, at_once or latents)
    if rows == latents:
        return peak * rows
    return max(peak * rows + image * (latents - rows), 2 * image * latents)


def evaluation_bytes(blueprint: Blueprint, price: Prices) -> float:
    """Of sampling, decoding and scoring a batch of the evaluation."""
    given, model = blueprint.config.evaluate, blueprint.config.model
    batch = min(given.batch, given.prompts)
    rows = batch * (2 if given.guidance != 1 else 1)
    kept = price.unet.kept * (batch + 1) + price.unet.merged
    unet = kept + price.unet.sample_peak * min(rows, model.unet_rows or rows)
    float32 = 3 * math.prod(blueprint.size) * FLOAT
    decode = decoding_bytes(price.evaluated_peak, float32, batch, model.decode_rows)
    judge = 2 * float32 * batch + price.judge_peak * batch
    return max(unet, kept + decode, judge)
