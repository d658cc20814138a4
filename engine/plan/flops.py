"""What an iteration costs by stage: rows (row_counts.py) times what a row costs (unit_costs.py), here and as published.

Counted are matrix products and convolutions. A prompt is taken to be encoded once for every time it is used, and the
judge's modulation, which strop keeps for a whole run, not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config.settings import varied
from ..config.training import Config
from .meta_models import Blueprint
from .meter import Flops
from .row_counts import Tally, tally
from .unit_costs import Prices, UNetPrices

STAGES = ("text", "trunk", "branches", "decode", "judge", "update: policy", "update: reference")
RECOMPUTED = "recomputed"
PUBLISHED = {"num_steps": 20, "t_range": (0, 751), "guidance": 5.0}  # in the authors' code, whatever the family
EXACT = {"rollout.judge_every": 1, "rollout.look_ahead": "full", "rollout.decoder": None}
EXACT |= {"optim.passes": 1, "optim.keep_pairs": 1.0}


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations per prompt.

    stages: by name, those of STAGES and, where activations are computed again in the backward pass, RECOMPUTED; plain:
    all of them but what the LoRA adds, and with a backward pass counted as one forward.
    """

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
    kept = counted.prompts + 1 if config.rollout.text_kv else 0
    return _cost(
        counted,
        unet,
        text=price.text * encoded(blueprint) + price.judge_text * counted.prompts,
        text_kept=unet.keep * kept + unet.merge,
        text_kept_base=unet.keep_base * kept,
        images=price.decode * counted.of("decode"),
        scores=price.judge * counted.of("judge"),
        train=counted.of("train"),
        reference=counted.of("reference"),
        recompute=unet.recompute if config.model.gradient_checkpointing else None,
    )


def published_cost(blueprint: Blueprint, price: Prices) -> Cost:
    """Of a recipe as the authors' code would run it, all pairs kept and no activation computed again.

    Winner and loser in separate calls, a second UNet as reference, the judge's text tower and modulation for every
    candidate at every event; none of the approximations.
    """
    blueprint = replace(blueprint, config=varied(blueprint.config, EXACT))
    counted = tally(blueprint.config, blueprint.schedule("cpu"))
    candidates = counted.of("judge")
    rows = 2 * (2 if blueprint.config.optim.guided else 1) * counted.pairs
    return _cost(
        counted,
        price.published,
        text=price.text * encoded(blueprint) + price.judge_text * candidates,
        text_kept=Flops(),
        text_kept_base=Flops(),
        images=price.decode_published * candidates,
        scores=(price.judge + price.modulation) * candidates,
        train=rows,
        reference=rows,
        recompute=None,
    )


def encoded(blueprint: Blueprint) -> int:
    """Prompts that the text encoders see in an iteration, the empty one among them where it is encoded."""
    return blueprint.config.rollout.prompts + (not blueprint.zero_null)


def _cost(
    counted: Tally,
    unet: UNetPrices,
    text: Flops,
    text_kept: Flops,
    text_kept_base: Flops,
    images: Flops,
    scores: Flops,
    train: int,
    reference: int,
    recompute: Flops | None,
) -> Cost:
    """Of an iteration: rollouts as counted, so many rows of the UNet trained and seen by the reference."""
    sampled = lambda stage: unet.sample * counted.of("unet", stage) + unet.alone * counted.of("alone", stage)
    rollout = sampled("rollout/trunk"), sampled("rollout/branches")
    update = unet.train * train, unet.reference * reference
    stages = dict(zip(STAGES, (text + text_kept, *rollout, images, scores, *update), strict=True))
    if recompute is not None:
        stages[RECOMPUTED] = recompute * train
    base = unet.sample_base * counted.of("unet") + unet.alone_base * counted.of("alone")
    base += unet.reference * (2 * train + reference)
    plain = text + text_kept_base + images + scores + base
    each = 1 / counted.prompts
    return Cost({name: flops * each for name, flops in stages.items()}, plain.all * each)


def published_recipe(blueprint: Blueprint) -> Blueprint:
    """The same models and resolution with the rollout of the authors' code."""
    rollout = {f"rollout.{key}": value for key, value in (PUBLISHED | blueprint.family.published_rollout).items()}
    return replace(blueprint, config=varied(blueprint.config, EXACT | rollout | {"optim.guided": True}))


def evaluation(config: Config, price: Prices) -> Flops:
    """Of a whole run: held-out prompts drawn twice, by the base and by the tuned model, over all processes."""
    given = config.evaluate
    forward = price.unet.sample * 2 if given.guidance != 1 else price.unet.alone
    return (forward * given.num_steps + price.unet.keep + price.evaluated + price.judge) * (2 * given.prompts)
