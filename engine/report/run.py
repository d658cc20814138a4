"""A run as its report reads it: the files of its folder, and the columns of its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import yaml

from ..config.find import DEFAULT, config_class
from ..config.training import Config
from ..evaluation import monitor
from ..methods.find import method_class
from ..methods.judge_training.method import JudgeTraining
from ..methods.spo.columns import AGREEMENT
from ..methods.spo.rollout import segments
from ..runtime.columns import LEFT_OUT, SHORT, Column, Heatmap


@dataclass(frozen=True)
class Run:
    """The files of a run folder: metrics.jsonl, summary.json ({} before it is written), config.yaml ("" for none).

    prompts: the lines of heldout.jsonl, one a held-out prompt: {"prompt": text, "scores": {name: {"base", "tuned"}}}.
    """

    dir: Path
    records: list[dict]
    summary: dict
    config: str
    prompts: list[dict] = field(default_factory=list)

    @cached_property
    def recipe(self) -> dict:
        """The configuration as a tree; {} where there is none."""
        return yaml.safe_load(self.config) or {}

    @property
    def config_class(self) -> type[Config]:
        """The class of the recipe's method, where it trains no judge."""
        return config_class(self.recipe.get("method", DEFAULT))

    @property
    def t_range(self) -> tuple[int, int]:
        """Lowest and highest timestep that is judged; (0, 999) where the configuration does not say."""
        low, high = (self.recipe.get("rollout") or {}).get("t_range", (0, 999))
        return low, high

    @property
    def judged_timesteps(self) -> list[int]:
        """The timesteps of the records at which the recipe judges branches, noise first."""
        maps = [column.name for column in self.columns if isinstance(column.drawn, Heatmap)]
        logged = {int(t) for record in self.records for name in maps for t in record.get(name) or ()}
        low, high = self.t_range
        inside = sorted((t for t in logged if low <= t <= high), reverse=True)
        if not inside:
            return []
        rollout = self.recipe.get("rollout") or {}
        judged = segments(range(len(inside)), rollout.get("inner_steps", 1), rollout.get("merge_last", False))
        return [inside[step] for segment in judged[:: rollout.get("judge_every", 1)] for step in segment]

    @property
    def iterations(self) -> int:
        """How many iterations were logged, or where there are no records, how many the summary has."""
        return self.records[-1]["iteration"] if self.records else self.summary.get("iterations", 0)

    @property
    def short(self) -> bool:
        """Whether the run has begun, but has too few iterations for anything to be concluded from it."""
        return 0 < self.iterations < SHORT

    @property
    def compared(self) -> dict[str, dict]:
        """The held-out comparisons of the summary: {"quality": {"base", "tuned", "delta", "n", "ci95", "p"}, ...}."""
        return {name: value for name, value in self.summary.items() if isinstance(value, dict) and "delta" in value}

    @property
    def independent(self) -> list[str]:
        """The held-out scores that were measured by something else than the judge and what it was trained from."""
        rewards, measured = (
            self.summary.get("rewards", ()),
            (n for n, row in self.compared.items() if row["delta"] is not None),
        )
        return [name for name in measured if monitor.independent_of_judge(name, rewards)]

    @property
    def trains_judge(self) -> bool:
        """Whether the run trains a judge: the recipe then names preference pairs and no prompts."""
        return "data" in self.recipe and "prompts" not in self.recipe

    @property
    def heldout(self) -> str:
        """The items that were held out: "pairs" where a judge is trained, else "prompts"."""
        return "pairs" if self.trains_judge else "prompts"

    @property
    def columns(self) -> Sequence[Column]:
        """The columns that the run's method reports, and its auditor and monitor if it had them."""
        last = next((record for record in reversed(self.records) if record.get(monitor.CHANGE.name)), None)
        labels = lambda column: tuple(last[column.name]) if isinstance(last[column.name], dict) else ()
        monitored = [replace(column, labels=labels(column)) for column in monitor.COLUMNS] if last else []
        audited = [AGREEMENT] if any(record.get(AGREEMENT.name) is not None for record in self.records) else []
        method = JudgeTraining if self.trains_judge else method_class(self.config_class)
        return (*method.columns, *audited, LEFT_OUT, *monitored)
