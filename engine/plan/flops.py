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
NONE = Flops()
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


@dataclass(frozen=True, slots=True)
class Work:
    """What an iteration does beside sampling.

    text: the text encoders', the judge's among them; kept, kept_base: keys and values of the text and the LoRA added to
    the weights, with and without the LoRA; images: decodes; scores: the judge's. train, reference: rows of the UNet
    that are trained and that the reference sees; recompute: of a row, by gradient checkpointing; None without it.
    """

    text: Flops
    images: Flops
    scores: Flops
    train: int
    reference: int
    kept: Flops = NONE
    kept_base: Flops = NONE
    recompute: Flops | None = None


def cost(blueprint: Blueprint, counted: Tally, price: Prices) -> Cost:
    """Of a recipe as strop runs it, all pairs kept."""
    unet, config = price.unet, blueprint.config
    kept = counted.prompts + 1 if config.rollout.text_kv else 0
    work = Work(
        text=price.text * encoded(blueprint) + price.judge_text * counted.prompts,
        images=price.decode * counted.of("decode"),
        scores=price.judge * counted.of("judge"),
        train=counted.of("train"),
        reference=counted.of("reference"),
        kept=unet.keep * kept + unet.merge,
        kept_base=unet.keep_base * kept,
        recompute=unet.recompute if config.model.gradient_checkpointing else None,
    )
    return _cost(counted, unet, work)


def published_cost(blueprint: Blueprint, price: Prices) -> Cost:
    """Of a recipe as the authors' code would run it, all pairs kept and no activation computed again.

    Winner and loser in separate calls, a second UNet as reference, the judge's text tower and modulation for every
    candidate at every event; none of the approximations.
    """
    blueprint = replace(blueprint, config=varied(blueprint.config, EXACT))
    counted = tally(blueprint.config, blueprint.schedule("cpu"))
    candidates = counted.of("judge")
    rows = 2 * (2 if blueprint.config.optim.guided else 1) * counted.pairs
    work = Work(
        text=price.text * encoded(blueprint) + price.judge_text * candidates,
        images=price.decode_published * candidates,
        scores=(price.judge + price.modulation) * candidates,
        train=rows,
        reference=rows,
    )
    return _cost(counted, price.published, work)


def encoded(blueprint: Blueprint) -> int:
    """Prompts that the text encoders see in an iteration, the empty one among them where it is encoded."""
    return blueprint.config.rollout.prompts + (not blueprint.zero_null)


def _cost(counted: Tally, unet: UNetPrices, work: Work) -> Cost:
    """Of an iteration whose rollouts are as counted."""
    sampled = lambda stage: unet.sample * counted.of("unet", stage) + unet.alone * counted.of("alone", stage)
    rollout = sampled("rollout/trunk"), sampled("rollout/branches")
    update = unet.train * work.train, unet.reference * work.reference
    stages = dict(zip(STAGES, (work.text + work.kept, *rollout, work.images, work.scores, *update), strict=True))
    if work.recompute is not None:
        stages[RECOMPUTED] = work.recompute * work.train
    base = unet.sample_base * counted.of("unet") + unet.alone_base * counted.of("alone")
    base += unet.reference * (2 * work.train + work.reference)
    plain = work.text + work.kept_base + work.images + work.scores + base
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
