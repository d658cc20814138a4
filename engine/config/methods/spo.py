"""The recipe of SPO: the keys that it has beside those of config/online.py, with the paper's defaults for SD-1.5."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from ..online import OnlineConfig, SamplingConfig
from ..training import Count, JudgeConfig, OptimConfig, Timestep


class RolloutConfig(SamplingConfig):
    k: int = Field(4, ge=2, le=256, description="Branches drawn from one noisy latent at each fork.")
    t_range: tuple[Timestep, Timestep] = Field(
        (0, 751),
        description="Lowest and highest training timestep whose steps are judged and trained (the paper's kappa). "
        "Steps above the highest are walked on one branch, the trunk; those below the lowest are not walked.",
    )
    inner_steps: int = Field(
        1,
        ge=1,
        description="Steps that a branch walks before it is judged; more than 1 is MSPO, as published for SDXL.",
    )
    merge_last: bool = Field(
        False,
        description="Whether a last segment of one step is joined to the one before, as in the published SDXL code.",
    )
    judge_every: int = Field(
        1,
        ge=1,
        description="Number n of which every n-th segment of inner_steps steps is forked, judged and trained; the "
        "others are walked on one branch. More than 1 is an approximation that gives fewer pairs per trajectory.",
    )
    look_ahead: Literal["full", "text"] = Field(
        "full",
        description="How the image of a branch is predicted for the judge. full is the guided prediction. text is an "
        "approximation: it predicts with the prompt alone and adds what guidance added one step earlier. The "
        "training is exact either way, because the branch that goes on gets its missing prediction.",
    )
    decoder: str | None = Field(
        None,
        description="Folder or hub id of an AutoencoderTiny that decodes the judge's images in place of the VAE, an "
        "approximation: madebyollin/taesd for Stable Diffusion 1.5, madebyollin/taesdxl for SDXL. The evaluation "
        "decodes with the VAE.",
    )
    next_state: Literal["random", "winner", "loser"] = Field(
        "random", description="The branch from which the trajectory goes on."
    )
    pair: Literal["best_worst", "random"] = Field(
        "best_worst", description="The two branches that make a pair; of two random ones, the better is the winner."
    )
    threshold: float = Field(0.3, ge=0, lt=1, description="Pairs with p(winner) - p(loser) above this are trained on.")
    threshold_noisiest: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Threshold at the noisiest step of a trajectory; down to rollout.threshold at its last step it "
        "falls linearly with the noise that a step adds, as LPO's does. null is rollout.threshold everywhere.",
    )
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of pairs to train on: the threshold is then set so that this share of the base model's "
        "first pairs lies above it, whatever the judge's scale, and rollout.threshold is not used. A run says what it "
        "came to.",
    )
    keep_by_timestep: bool = Field(
        False, description="Whether rollout.keep sets a threshold for each timestep, so that none stays without pairs."
    )

    @model_validator(mode="after")
    def _range_is_one(self) -> RolloutConfig:
        low, high = self.t_range
        if low > high:
            raise ValueError(f"t_range is [{low}, {high}], expected the lower timestep first")
        return self

    @model_validator(mode="after")
    def _one_rule_of_keeping(self) -> RolloutConfig:
        if self.keep is not None and self.threshold_noisiest is not None:
            raise ValueError("keep and threshold_noisiest are both given, expected one of them")
        if self.keep is None and self.keep_by_timestep:
            raise ValueError("keep_by_timestep is true without keep, the share to keep; give that too")
        return self

    @model_validator(mode="after")
    def _text_is_a_half(self) -> RolloutConfig:
        if self.look_ahead == "text" and self.guidance == 1:
            raise ValueError("look_ahead is text, but with guidance 1 there is no other half to leave out; use full")
        return self


class SPOOptimConfig(OptimConfig):
    micro_batch: Count = Field(10, description="Pairs per backward pass and process; fewer take less memory.")
    beta: float = Field(10.0, gt=0, description="DPO beta: weight of the difference of the log-ratios.")
    clip: float | None = Field(
        0.1, gt=0, lt=1, description="Probability ratios are clamped to [1 - clip, 1 + clip]; null leaves them free."
    )
    guided: bool | Literal["text"] = Field(
        True,
        description="Whether the guided prediction (rollout.guidance) is trained, or (false) the one with the prompt "
        "alone. text is an approximation: the guided prediction, whose half without the prompt gets no gradient.",
    )
    accumulate: Count = Field(1, description="Micro-batches per optimizer step.")
    passes: Count = Field(
        1,
        description="Passes over the pairs of each rollout, shuffled anew for each; the reference predicts once for "
        "all of them. More than 1 is an approximation, because later passes train on pairs of an older policy.",
    )
    keep_pairs: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a rollout's pairs that is trained on. Less than 1 is an approximation, and a poor trade "
        "where the rollout costs more than the training.",
    )
    keep_by: Literal["random", "surest"] = Field(
        "random",
        description="Which pairs optim.keep_pairs leaves: some drawn at random, or those whose scores differ most.",
    )

    @model_validator(mode="after")
    def _has_pairs_to_leave_out(self) -> SPOOptimConfig:
        if self.keep_by == "surest" and self.keep_pairs == 1:
            raise ValueError("keep_by is surest, but keep_pairs is 1, which leaves none out; give the share to keep")
        return self


class AuditConfig(JudgeConfig):
    path: str | None = Field(
        None,
        description="The auditor, a second judge that scores some of the judge's branches and trains nothing, in the "
        "forms of judge.path; null for none.",
    )
    components: str | None = Field(
        None, description=JudgeConfig.model_fields["components"].description.replace("judge.path", "audit.path")
    )
    every: int | None = Field(
        None,
        ge=1,
        description="Iterations from one audit to the next; the first iteration has one. An audit reports `agreement`, "
        "Kendall's tau between the scores of judge and auditor over the branches of a fork. Nothing that is trained "
        "changes by it.",
    )
    prompts: Count = Field(
        2,
        description="How many of its prompts each process audits, at every fork. Of each, an auditor that looks at "
        "images beside a latent judge costs the look-aheads and decodes that this judge spares; `strop plan` counts "
        "them.",
    )

    @model_validator(mode="after")
    def _path_and_every(self) -> AuditConfig:
        if (self.path is None) != (self.every is None):
            given, missing = ("every", "path") if self.path is None else ("path", "every")
            raise ValueError(f"{given} is given without {missing}; give both for an auditor, or neither")
        return self


class SPOConfig(OnlineConfig):
    """A recipe of step-by-step preference optimization (arXiv 2406.04314)."""

    name: ClassVar[str] = "SPO"
    title: ClassVar[str] = "step-by-step preference optimization (SPO, arXiv 2406.04314)"
    code: ClassVar[str] = "spo.method:SPO"

    method: Literal["spo"] = Field("spo", description="This method.")
    rollout: RolloutConfig = RolloutConfig()
    optim: SPOOptimConfig = SPOOptimConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _has_a_half_without_the_prompt(self) -> SPOConfig:
        if self.optim.guided == "text" and self.rollout.guidance == 1:
            raise ValueError("optim.guided is text, but with rollout.guidance 1 there is no other half; use true")
        return self

    @property
    def auditor(self) -> AuditConfig | None:
        """The auditor, None where the recipe has none."""
        return self.audit if self.audit.every else None

    @property
    def guided_update(self) -> bool:
        """Whether the update computes both guidance halves."""
        return bool(self.optim.guided) and super().guided_update

    def in_words(self, ranks: int) -> str:
        """Returns what an iteration does, as a run announces it."""
        return f"{super().in_words(ranks)}, {self.rollout.k} branches"

    @property
    def models_read(self) -> dict[str, str]:
        """Folders or hub ids of models that the run reads beside base model and judge, by key."""
        return {"rollout.decoder": self.rollout.decoder} if self.rollout.decoder else {}
