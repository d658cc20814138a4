"""A run as its report sees it: what was read of its folder, and what its method says of its columns."""

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
    """A run folder as read: records of metrics.jsonl; {} for a summary.json not yet written, "" for no config.yaml."""

    dir: Path
    records: list[dict]
    summary: dict
    config: str

    @property
    def recipe(self) -> dict:
        """The configuration as a tree; empty where there is none."""
        return yaml.safe_load(self.config) or {}

    @property
    def t_range(self) -> tuple[int, int]:
        """Lowest and highest timestep that is judged, all when the configuration does not say."""
        low, high = (self.recipe.get("rollout") or {}).get("t_range", (0, 999))
        return low, high

    @property
    def trains_judge(self) -> bool:
        """Whether it is a judge that is trained: the recipe names preference pairs."""
        return "data" in self.recipe

    @property
    def heldout(self) -> str:
        """What was held out to measure on."""
        return "pairs" if self.trains_judge else "prompts"

    @property
    def columns(self) -> Sequence[Column]:
        """What the run's method reports."""
        return judge_training.COLUMNS if self.trains_judge else spo.COLUMNS
