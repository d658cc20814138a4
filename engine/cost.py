"""What an iteration costs by stage: the rows of tally.py times the prices of prices.py, of strop and as published.

Counted are matrix products and convolutions. A prompt is taken to be encoded once for every time it is used, and the
judge's modulation, which strop keeps for a whole run, not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from strop.engine.blueprint import Blueprint
from strop.engine.config import Config
from strop.engine.gauge import Flops
from strop.engine.prices import Prices
from strop.engine.settings import varied
from strop.engine.tally import Tally, tally

STAGES = ("text", "trunk", "branches", "decode", "judge", "update: policy", "update: reference")
RECOMPUTED = "recomputed"
PUBLISHED = {  # what the authors' code does: rollouts of SD-1.5 and of SDXL
    "sd15": {"k": 4, "inner_steps": 1, "merge_last": False},
    "sdxl": {"k": 2, "inner_steps": 4, "merge_last": True},
}
ALIKE = {"num_steps": 20, "t_range": (0, 751), "guidance": 5.0}  # in both of them
EXACT = {"rollout.judge_every": 1, "rollout.look_ahead": "full", "rollout.decoder": None}
EXACT |= {"optim.passes": 1, "optim.keep_pairs": 1.0}


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations per prompt. stages: by name, those of STAGES and, where activations are computed again in the backward
    pass, RECOMPUTED; plain: all of them but for the LoRA and with a backward pass counted as one forward."""

    stages: dict[str, Flops]
    plain: float

    @property
    def needed(self) -> Flops:
        """Without what gradient checkpointing computes again."""
        return sum((self.stages[name] for name in STAGES), Flops())

    @property
    def done(self) -> Flops:
        return sum(self.stages.values(), Flops())


def cost(blueprint: Blueprint, counted: Tally, price: Prices) -> Cost:
    """Of a recipe as strop runs it, all pairs kept."""
    unet, config = price.unet, blueprint.config
    prompts, images = counted.prompts, counted.of("judge")
    encoded = prompts + (not blueprint.zero_null)
    kept = prompts + 1 if config.rollout.text_kv else 0
    trunk, branches = (counted.of("unet", f"rollout/{stage}") for stage in ("trunk", "branches"))
    train, reference = counted.of("train"), counted.of("reference")
    common = price.text * encoded + price.judge_text * prompts
    decode, judge = price.decode * counted.of("decode"), price.judge * images
    stages = {
        "text": common + unet.keep * kept + unet.merge,
        "trunk": unet.sample * trunk,
        "branches": unet.sample * branches,
        "decode": decode,
        "judge": judge,
        "update: policy": unet.train * train,
        "update: reference": unet.reference * reference,
    }
    if config.model.gradient_checkpointing:
        stages[RECOMPUTED] = unet.recompute * train
    rollout = unet.sample_base * (trunk + branches) + unet.keep_base * kept
    plain = common + rollout + decode + judge + unet.reference * (2 * train + reference)
    return Cost({name: flops * (1 / prompts) for name, flops in stages.items()}, plain.all / prompts)


def published_cost(blueprint: Blueprint, price: Prices) -> Cost:
    """Of a recipe as the authors' code would run it, all pairs kept and no activation computed again.

    Winner and loser in separate calls, a second UNet as reference, the judge's text tower and modulation for every
    candidate at every event; none of the approximations.
    """
    blueprint = replace(blueprint, config=varied(blueprint.config, EXACT))
    unet, counted = price.published, tally(blueprint.config, blueprint.schedule("cpu"))
    prompts, images = counted.prompts, counted.of("judge")
    encoded = prompts + (not blueprint.zero_null)
    trunk, branches = (counted.of("unet", f"rollout/{stage}") for stage in ("trunk", "branches"))
    rows = 2 * (2 if blueprint.config.optim.guided else 1) * counted.pairs
    text = price.text * encoded + price.judge_text * images
    decode, judge = price.decode_published * counted.of("decode"), (price.judge + price.modulation) * images
    stages = {
        "text": text,
        "trunk": unet.sample * trunk,
        "branches": unet.sample * branches,
        "decode": decode,
        "judge": judge,
        "update: policy": unet.train * rows,
        "update: reference": unet.reference * rows,
    }
    plain = text + decode + judge + unet.sample_base * (trunk + branches) + unet.reference * (3 * rows)
    return Cost({name: flops * (1 / prompts) for name, flops in stages.items()}, plain.all / prompts)


def published_recipe(blueprint: Blueprint) -> Blueprint:
    """The same models and resolution with the rollout of the authors' code."""
    rollout = {f"rollout.{key}": value for key, value in (ALIKE | PUBLISHED[blueprint.family]).items()}
    return replace(blueprint, config=varied(blueprint.config, EXACT | rollout | {"optim.guided": True}))


def evaluation(config: Config, price: Prices) -> Flops:
    """Of a whole run: held-out prompts drawn twice, by the base and by the tuned model, over all processes."""
    given = config.evaluate
    rows = given.num_steps * (2 if given.guidance != 1 else 1)
    return (price.unet.sample * rows + price.unet.keep + price.evaluated + price.judge) * (2 * given.prompts)
