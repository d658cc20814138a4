"""Computes the floating-point operations of an iteration by stage: rows (row_counts.py) times costs (unit_costs.py).

The same is counted for SPO's published code. Only matrix products and convolutions count. A prompt is taken to be
encoded once for every time it is used, a pair that is cached before the loop not at all. The judge's modulation, which
strop caches for a whole run, is left out; a scorer that gives rewards counts as the judge. An audit is spread over the
iterations from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config.methods.spo import SPOConfig
from ..config.settings import keys, varied
from ..config.training import Config
from ..judge.latent import LatentJudge
from .meta_models import ModelBuilder
from .meter import Flops
from .row_counts import AUDIT, RowCounts, count_rows
from .unit_costs import Costs

RECOMPUTED = "recomputed"
NONE = Flops()
PUBLISHED = {"num_steps": 20, "t_range": (0, 751), "guidance": 5.0}  # in the authors' code, whatever the family
EXACT = {"rollout.judge_every": 1, "rollout.look_ahead": "full", "rollout.decoder": None}
EXACT |= {"optim.passes": 1, "optim.keep_pairs": 1.0, "optim.keep_by": "random"}
EXACT |= {"judge.kind": "spm", "judge.guidance": None, "audit.path": None, "audit.every": None}


@dataclass(frozen=True, slots=True)
class StageFlops:
    """Operations per prompt, or per pair, as RowCounts.item says.

    stages: by name, those that there are, in the order of an iteration. plain: the sum of all but RECOMPUTED, without
    what the LoRA adds, and with a backward pass counted as one forward.
    """

    stages: dict[str, Flops]
    plain: float

    @property
    def needed(self) -> Flops:
        """The sum without what gradient checkpointing computes again."""
        return sum((flops for name, flops in self.stages.items() if name != RECOMPUTED), Flops())

    @property
    def done(self) -> Flops:
        """The sum of everything that is computed."""
        return sum(self.stages.values(), Flops())


def stage_flops(builder: ModelBuilder, counts: RowCounts, costs: Costs) -> StageFlops:
    """Returns the operations of a recipe as strop runs it, where every pair is sure enough to be trained on."""
    config, total = builder.config, counts.total
    train, reference, forward = total("train"), total("reference"), total("forward")
    cached_texts = counts.prompts + 1 if counts.prompts and config.text_kv else 0
    texts = total("text") + (0 if builder.zero_null else total("empty text"))
    text = sum((each.flops for each in costs.judge_texts.values()), NONE) * counts.prompts
    text += costs.text.flops * encoded_prompts(builder)

    def rollout(cost: Callable[[bool], Flops], stage: str | None = None) -> Flops:
        rows = {True: total("guided", stage), False: total("unguided", stage)}
        return sum((cost(guided) * count for guided, count in rows.items() if count), NONE)

    def audit(cost: Callable[[bool], Flops]) -> Flops:
        if not config.auditor:
            return NONE
        scores = costs.decode().flops * total("decode", AUDIT) + costs.scores["auditor"].flops * total("auditor", AUDIT)
        return (rollout(cost, AUDIT) + scores) * (1 / config.auditor.every)

    sampled, update = lambda guided: costs.sampled(guided).flops, costs.update(False).flops
    encode = costs.encode().flops * total("encode") + costs.text.flops * texts
    decode, judge = costs.decode().flops * total("decode"), costs.scores["judge"].flops * total("judge")
    stages = {
        "text": text + costs.text_kv().flops * cached_texts + costs.merge().flops * bool(counts.prompts),
        "encode": encode,
        "trunk": rollout(sampled, "rollout/trunk"),
        "branches": rollout(sampled, "rollout/branches"),
        "decode": decode,
        "judge": judge,
        "audit": audit(sampled),
        "update: policy": (update - costs.predicted(lora=False)) * train,
        "update: reference": costs.predicted(lora=False) * reference,
        "update: other forwards": costs.predicted(lora=True) * forward if forward else NONE,
        RECOMPUTED: (costs.update(True).flops - update) * train if config.model.gradient_checkpointing else NONE,
    }
    base = costs.text_kv(lora=False).flops * cached_texts + rollout(costs.sampled_base) + audit(costs.sampled_base)
    base += costs.predicted(lora=False) * (2 * train + reference + forward)
    return _per_item(counts, stages, text + encode + decode + judge + base)


def published_flops(builder: ModelBuilder, costs: Costs) -> StageFlops:
    """Returns the operations of a recipe as SPO's authors' code would run it, with every pair and no checkpointing.

    The recipe is one of SPO, or of a method with the same rollout.
    Winner and loser are computed in separate calls, a second UNet is the reference, and the judge's text tower and
    modulation run for every candidate at every event. None of the recipe's approximations is used.
    """
    builder, row = replace(builder, config=varied(spo_recipe(builder.config), EXACT)), costs.published
    counts = count_rows(builder.config, builder.schedule("cpu"))
    candidates = counts.total("judge")
    sampled = lambda stage=None: counts.total("guided", stage) + counts.total("unguided", stage)
    learned = 2 * (2 if builder.config.optim.guided else 1) * counts.trained_rows
    text = costs.text.flops * encoded_prompts(builder) + row["judge_text"] * candidates
    decode, judge = row["decode"] * candidates, row["judge"] * candidates
    stages = {
        "text": text,
        "trunk": row["forward"] * sampled("rollout/trunk"),
        "branches": row["forward"] * sampled("rollout/branches"),
        "decode": decode,
        "judge": judge,
        "update: policy": row["train"] * learned,
        "update: reference": row["reference"] * learned,
    }
    return _per_item(counts, stages, text + decode + judge + row["reference"] * (sampled() + 3 * learned))


def _per_item(counts: RowCounts, stages: dict[str, Flops], plain: Flops) -> StageFlops:
    each = 1 / counts.items
    return StageFlops({name: flops * each for name, flops in stages.items() if flops.all}, plain.all * each)


def encoded_prompts(builder: ModelBuilder) -> int:
    """Returns how many prompts the text encoders see in an iteration, the empty one included where it is encoded."""
    prompts = builder.config.prompts_per_iteration
    return prompts + (prompts > 0 and not builder.zero_null)


def spo_recipe(config: Config) -> SPOConfig:
    """Returns the recipe of SPO with the same keys, of a recipe that has all of SPO's."""
    tree = config.model_dump() | {"method": "spo"}
    for section, _, key in (key.partition(".") for key in {*keys(type(config))} - {*keys(SPOConfig)}):
        del tree[section][key]
    return SPOConfig.model_validate(tree)


def published_recipe(builder: ModelBuilder) -> ModelBuilder:
    """Returns the same models and resolution with the rollout of the code of SPO's authors."""
    rollout = {f"rollout.{key}": value for key, value in (PUBLISHED | builder.family.published_rollout).items()}
    return replace(builder, config=varied(spo_recipe(builder.config), EXACT | rollout | {"optim.guided": True}))


def evaluation_flops(config: Config, costs: Costs) -> Flops:
    """Returns the operations of all evaluation of a run, in all processes: the held-out prompts are drawn twice, by the
    base and by the tuned model."""
    evaluate = config.evaluate
    guided = evaluate.guidance != 1
    image = costs.sampled(guided).flops * (evaluate.num_steps * (2 if guided else 1)) + costs.text_kv().flops
    image += costs.decode(True).flops + costs.scores["judge"].flops
    image += costs.encode().flops if config.judge.kind == LatentJudge.kind else NONE
    return image * (2 * evaluate.prompts)
