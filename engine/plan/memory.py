"""Computes the memory that a run takes on a GPU: the parts that stay, and the peak of each phase, with those parts.

Tensors are counted as meter.py does. RESERVE is an unmeasured allowance for the CUDA context, the allocator's gaps
and the workspaces of libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .meta_models import ModelBuilder
from .row_counts import TEXT_ENCODERS, VAE_ENCODER, RowCounts
from .unit_costs import Costs

RESERVE = 1.5e9  # bytes
VIT_H, VIT_L = 3.94e9, 1.71e9  # bytes of a whole CLIP in float32
SCORERS = {"pickscore": VIT_H, "hpsv2": VIT_H, "hpsv2.1": VIT_H, "image_reward": 1.79e9, "aesthetic": VIT_L}
SCORERS |= {"clip_score": VIT_L}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of the parts that stay through the training, and at the peak of each phase with the parts it needs."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def peak(self) -> float:
        return self.phases[self.peak_phase]


def memory_use(builder: ModelBuilder, counts: RowCounts, costs: Costs, ranks: int) -> MemoryUse:
    """Returns the memory that one of `ranks` processes takes, each on its own GPU."""
    config, weights = builder.config, costs.weights
    lora, latent = weights["LoRA"], math.prod(builder.latent_shape)
    encoders = {part: weights[part] for part in (TEXT_ENCODERS, VAE_ENCODER)}
    named = lambda part: part if counts.total("encode") else f"{part}, which training does not use"
    models = {
        **{part: weights[part] for part in ("UNet", "VAE decoder")},
        **{named(part): encoders[part] for part in counts.kept},
        **{part: weights[part] for part in ("tiny decoder", *costs.scores, "LoRA") if weights[part]},
        **({"average of the LoRA": lora * counts.lora_copies} if counts.lora_copies else {}),
    }
    specs = [*config.evaluate.scorers, *filter(None, [config.rewarded_by])]
    scorers = sum(SCORERS.get(spec.partition("=")[0], 0.0) for spec in specs)
    if scorers:
        models["scorers"] = scorers
    master = lora / ranks if ranks > 1 else 0  # DeepSpeed's copy of the parameters that a process updates
    parts = models | {"optimizer state": 2 * lora / ranks + master}
    resident = sum(parts.values())
    rows = counts.collected_bytes(latent)
    gradients = gradient_bytes(config.zero.stage, lora, ranks, config.accumulate)
    largest, images = counts.largest, costs.image_bytes() * counts.largest["decode"]
    sampling = costs.text_kv().peak * (counts.prompts + 1) + costs.merge().peak + rows
    decode = decoding_bytes(costs.decode().peak, costs.image_bytes(), largest["decode"], config.model.decode_rows)
    scoring = lambda judge: resident + sampling + images + costs.scores[judge].peak * largest[judge]
    unet_rows = max(largest["guided"], largest["unguided"])
    unet_rows = min(unet_rows, config.model.unet_rows or unet_rows)
    update = costs.update(config.model.gradient_checkpointing).peak
    released = sum(encoders.values()) - sum(encoders[part] for part in counts.kept)
    loaded = sum(models.values()) + released + sum(weights[f"{judge}'s text encoder"] for judge in costs.scores)
    phases = {
        "embedding the prompts": loaded + max(text.peak for text in (costs.text, *costs.judge_texts.values())),
        "encode": resident + gradients + max(costs.encode().peak * largest["encode"], costs.text.peak),
        "rollout: UNet": resident + sampling + costs.sampled().peak * unet_rows,
        "rollout: decode": resident + sampling + decode,
        **{f"rollout: {judge}": scoring(judge) for judge in costs.scores},
        "update": resident + gradients + 2 * rows + update * update_rows(builder, counts),
        "evaluation": resident + evaluation_bytes(builder, costs),
        "balance of pairs": resident + (2 * ranks + 1) * rows,
    }
    absent = {"encode": not largest["encode"], "balance of pairs": ranks == 1 or not counts.exchanged}
    absent |= {phase: not counts.prompts for phase in phases if phase.startswith("rollout")}
    absent["rollout: decode"] = not largest["decode"]
    return MemoryUse(parts, {phase: size for phase, size in phases.items() if not absent.get(phase)})


def gradient_bytes(stage: int, lora: float, ranks: int, accumulate: int) -> float:
    """Returns the bytes of the gradients of `lora` bytes of parameters under this ZeRO stage.

    With several processes, the bucket in which gradients travel and a flat copy of it are included, and where a step
    takes several micro-batches, their sums.
    """
    if ranks == 1:
        return lora
    return (lora if stage == 1 else lora / ranks) + 2 * lora + (lora if accumulate > 1 else 0)


def update_rows(builder: ModelBuilder, counts: RowCounts) -> int:
    """Returns the most rows that a micro-batch can put through the UNet: with gradients, all may have two latents."""
    halves = 2 if builder.config.guided_update else 1
    return halves * min(builder.config.optim.micro_batch, counts.trained_rows) * counts.x_t_per_row


def decoding_bytes(peak: float, image: float, latents: int, at_once: int | None) -> float:
    """Returns the peak of decoding so many latents, `at_once` in a forward (None: all).

    peak: bytes of decoding one latent; image: bytes of its result. The results of all forwards wait to be joined.
    """
    rows = min(latents, at_once or latents)
    if rows == latents:
        return peak * rows
    return max(peak * rows + image * (latents - rows), 2 * image * latents)


def evaluation_bytes(builder: ModelBuilder, costs: Costs) -> float:
    """Returns the peak of sampling, decoding and scoring a batch of the evaluation, without the resident parts."""
    evaluate, model = builder.config.evaluate, builder.config.model
    batch = min(evaluate.batch, evaluate.prompts)
    rows = batch * (2 if evaluate.guidance != 1 else 1)
    sampling = costs.text_kv().peak * (batch + 1) + costs.merge().peak
    unet = sampling + costs.sampled().peak * min(rows, model.unet_rows or rows)
    image = 3 * math.prod(builder.size) * 4  # bytes, in float32
    decode = decoding_bytes(costs.decode(True).peak, image, batch, model.decode_rows)
    judge = 2 * image * batch + costs.scores["judge"].peak * batch
    return max(unet, sampling + decode, judge)
