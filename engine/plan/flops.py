"""Computes the floating-point operations of an iteration by stage: rows (row_counts.py) times costs (unit_costs.py).

The same is counted for SPO's published code. Only matrix products and convolutions count. A prompt is taken to be
encoded once for every time it is used, a pair that is cached before the loop not at all. The judge's modulation, which
strop caches for a whole run, is left out; a scorer that gives rewards counts as the judge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config.methods.spo import SPOConfig
from ..config.settings import keys, varied
from ..config.training import Config
from ..judge.latent import LatentJudge
from .meta_models import ModelBuilder
from .meter import Flops
from .row_counts import RowCounts, count_rows
from .unit_costs import UNetCosts, UnitCosts

STAGES = ("text", "encode", "trunk", "branches", "decode", "judge", "audit")
STAGES += ("update: policy", "update: reference", "update: other forwards")
RECOMPUTED = "recomputed"
NONE = Flops()
PUBLISHED = {"num_steps": 20, "t_range": (0, 751), "guidance": 5.0}  # in the authors' code, whatever the family
EXACT = {"rollout.judge_every": 1, "rollout.look_ahead": "full", "rollout.decoder": None}
EXACT |= {
    "optim.passes": 1,
    "optim.keep_pairs": 1.0,
    "optim.keep_by": "random",
    "judge.kind": "spm",
    "judge.guidance": None,
}
EXACT |= {"audit.path": None, "audit.every": None}


@dataclass(frozen=True, slots=True)
class StageFlops:
    """Operations per prompt, or per pair, as RowCounts.item says.

    stages: by name, those of STAGES that there are and, with gradient checkpointing, RECOMPUTED. plain: the sum of
    STAGES without what the LoRA adds, and with a backward pass counted as one forward.
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


@dataclass(frozen=True, slots=True)
class OtherWork:
    """Work of an iteration besides the forwards of its rollout.

    text: by the text encoders, the judge's included. text_kv, text_kv_base: keys and values of the text and merging the
    LoRA into the weights, with and without the LoRA. audit, audit_base: an audit, spread over the iterations from one
    to the next, with and without the LoRA. encoded: by text encoders and VAE within the loop. images:
    decoding. scores: by the judge. train, reference, forward: UNet rows of the update that are trained on, that the
    reference computes, and others. recompute: of one row, by gradient checkpointing; None without it.
    """

    text: Flops
    images: Flops
    scores: Flops
    train: int
    reference: int
    forward: int = 0
    encoded: Flops = NONE
    text_kv: Flops = NONE
    text_kv_base: Flops = NONE
    audit: Flops = NONE
    audit_base: Flops = NONE
    recompute: Flops | None = None


def stage_flops(builder: ModelBuilder, counts: RowCounts, costs: UnitCosts) -> StageFlops:
    """Returns the operations of a recipe as strop runs it, where every pair is sure enough to be trained on."""
    unet, config = costs.unet, builder.config
    cached_texts = counts.prompts + 1 if counts.prompts and config.text_kv else 0
    texts = counts.total("text") + (0 if builder.zero_null else counts.total("empty text"))
    auditor_text = costs.auditor.text if config.auditor else NONE
    other = OtherWork(
        text=costs.text * encoded_prompts(builder) + (costs.judge_text + auditor_text) * counts.prompts,
        images=costs.decode * counts.total("decode"),
        scores=costs.judge * counts.total("judge"),
        train=counts.total("train"),
        reference=counts.total("reference"),
        forward=counts.total("forward"),
        encoded=costs.encode * counts.total("encode") + costs.text * texts,
        text_kv=unet.text_kv * cached_texts + unet.merge * bool(counts.prompts),
        text_kv_base=unet.text_kv_base * cached_texts,
        audit=audit_flops(config, counts, costs, unet.guided, unet.unguided),
        audit_base=audit_flops(config, counts, costs, unet.guided_base, unet.unguided_base),
        recompute=unet.recompute if config.model.gradient_checkpointing else None,
    )
    return _stage_flops(counts, unet, other)


def published_flops(builder: ModelBuilder, costs: UnitCosts) -> StageFlops:
    """Returns the operations of a recipe as SPO's authors' code would run it, with every pair and no checkpointing.

    The recipe is one of SPO, or of a method with the same rollout.
    Winner and loser are computed in separate calls, a second UNet is the reference, and the judge's text tower and
    modulation run for every candidate at every event. None of the recipe's approximations is used.
    """
    builder = replace(builder, config=varied(spo_recipe(builder.config), EXACT))
    counts = count_rows(builder.config, builder.schedule("cpu"))
    candidates = counts.total("judge")
    update_rows = 2 * (2 if builder.config.optim.guided else 1) * counts.trained_rows
    other = OtherWork(
        text=costs.text * encoded_prompts(builder) + costs.published_judge_text * candidates,
        images=costs.decode_published * candidates,
        scores=costs.published_judge * candidates,
        train=update_rows,
        reference=update_rows,
    )
    return _stage_flops(counts, costs.published_unet, other)


def encoded_prompts(builder: ModelBuilder) -> int:
    """Returns how many prompts the text encoders see in an iteration, the empty one included where it is encoded."""
    prompts = builder.config.prompts_per_iteration
    return prompts + (prompts > 0 and not builder.zero_null)


def _stage_flops(counts: RowCounts, unet: UNetCosts, other: OtherWork) -> StageFlops:
    sampled = lambda stage: (
        unet.guided * counts.total("guided", stage) + unet.unguided * counts.total("unguided", stage)
    )
    rollout = sampled("rollout/trunk"), sampled("rollout/branches")
    update = unet.train * other.train, unet.reference * other.reference, unet.forward * other.forward
    by_stage = (other.text + other.text_kv, other.encoded, *rollout, other.images, other.scores, other.audit, *update)
    stages = {name: flops for name, flops in zip(STAGES, by_stage, strict=True) if flops.all}
    if other.recompute is not None:
        stages[RECOMPUTED] = other.recompute * other.train
    base = unet.guided_base * counts.total("guided") + unet.unguided_base * counts.total("unguided")
    base += unet.reference * (2 * other.train + other.reference + other.forward)
    plain = other.text + other.text_kv_base + other.encoded + other.images + other.scores + other.audit_base + base
    per_item = 1 / counts.items
    return StageFlops({name: flops * per_item for name, flops in stages.items()}, plain.all * per_item)


def audit_flops(config: Config, counts: RowCounts, costs: UnitCosts, guided: Flops, unguided: Flops) -> Flops:
    """Returns the operations of audits by iteration. guided, unguided: of a row of such a forward of the UNet."""
    if not config.auditor:
        return NONE
    rows = counts.audit
    forwards = guided * rows["guided"] + unguided * rows["unguided"]
    audit = forwards + costs.decode * rows["decode"] + costs.auditor.score * rows["auditor"]
    return audit * (1 / config.auditor.every)


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


def evaluation_flops(config: Config, costs: UnitCosts) -> Flops:
    """Returns the operations of all evaluation of a run, in all processes: the held-out prompts are drawn twice, by the
    base and by the tuned model."""
    evaluate = config.evaluate
    forward = costs.unet.guided * 2 if evaluate.guidance != 1 else costs.unet.unguided
    image = forward * evaluate.num_steps + costs.unet.text_kv + costs.evaluation_decode + costs.judge
    image += costs.encode if config.judge.kind == LatentJudge.kind else NONE
    return image * (2 * evaluate.prompts)
