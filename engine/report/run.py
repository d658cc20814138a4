"""A run as its report reads it: the files of its folder, and the columns of its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..methods.judge_training import columns as judge_training
from ..methods.spo import columns as spo
from ..runtime.columns import Column


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run folder: metrics.jsonl, summary.json ({} before it is written), config.yaml ("" for none)."""

    dir: Path
    records: list[dict]
    summary: dict
    config: str

    @property
    def recipe(self) -> dict:
        """The configuration as a tree; {} where there is none."""
        return yaml.safe_load(self.config) or {}

    @property
    def t_range(self) -> tuple[int, int]:
        """Lowest and highest timestep that is judged; (0, 999) where the configuration does not say."""
        low, high = (self.recipe.get("rollout") or {}).get("t_range", (0, 999))
        return low, high

    @property
    def trains_judge(self) -> bool:
        """Whether the run trains a judge: the recipe then names preference pairs."""
        return "data" in self.recipe

    @property
    def heldout(self) -> str:
        """The items that were held out: "pairs" where a judge is trained, else "prompts"."""
        return "pairs" if self.trains_judge else "prompts"

    @property
    def columns(self) -> Sequence[Column]:
        """The columns that the run's method reports."""
        return judge_training.COLUMNS if self.trains_judge else spo.COLUMNS
