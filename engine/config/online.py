"""What the recipes of all methods that draw their own samples have: prompts to train on, and a rollout."""

from __future__ import annotations

from pydantic import Field

from .settings import Section
from .training import PROMPT_FILE, Config, Count, HeldoutConfig

JUDGE = "judge"  # as a reward


class PromptsConfig(HeldoutConfig):
    train: str = Field(description=f"File of training prompts: {PROMPT_FILE}")


class SamplingConfig(Section):
    prompts: Count = Field(10, description="Prompts per iteration and process.")
    num_steps: int = Field(20, ge=2, le=1000, description="DDIM steps of a trajectory.")
    eta: float = Field(1.0, gt=0, le=1, description="DDIM eta; steps without noise, at 0, have no log-probability.")
    guidance: float = Field(5.0, ge=1, description="Classifier-free guidance scale; 1 switches guidance off.")
    text_kv: bool = Field(
        True,
        description="Whether the cross-attention keys and values of a prompt are computed once per rollout (and "
        "evaluated batch), not once per step and branch. The numbers are the same but for rounding.",
    )


class OnlineConfig(Config):
    """A recipe of a method that samples from its policy while it trains."""

    prompts: PromptsConfig
    rollout: SamplingConfig = SamplingConfig()

    @property
    def prompts_per_iteration(self) -> int:
        """The prompts that a process samples for in an iteration."""
        return self.rollout.prompts

    @property
    def text_kv(self) -> bool:
        """Whether keys and values of a prompt are computed once, also in the evaluation."""
        return self.rollout.text_kv

    @property
    def guided_update(self) -> bool:
        """Whether the update computes both guidance halves."""
        return self.rollout.guidance != 1

    @property
    def files_read(self) -> dict[str, str]:
        """Files or folders of data that the run reads, by key."""
        return {"prompts.train": self.prompts.train} | super().files_read

    def in_words(self, ranks: int) -> str:
        """Returns what an iteration does, as a run announces it."""
        prompts = f"{self.rollout.prompts} prompts" if ranks == 1 else f"{ranks} x {self.rollout.prompts} prompts"
        return f"{self.run.iterations} iterations of {prompts}, {self.rollout.num_steps} steps"


class RewardedConfig(OnlineConfig):
    """A recipe of a method that compares rewards of finished images."""

    reward: str = Field(
        JUDGE,
        description="What rewards the finished images: judge, the section of this name, or one of the scorers that "
        "evaluate.scorers may name.",
    )

    @property
    def rewarded_by(self) -> str | None:
        """The scorer that rewards what is trained, as evaluate.scorers names it; None where the judge does."""
        return None if self.reward == JUDGE else self.reward
