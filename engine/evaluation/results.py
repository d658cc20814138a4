"""What the scores of an evaluation show: means, paired changes against the base, win rates, and one sentence on them.

One prompt is one independent answer: of several images of a prompt the mean is compared. Nothing of when or how long
is in the results, so that an evaluation that was interrupted ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .compare import beyond_chance, paired_delta
from .intervals import ENOUGH, wilson
from .score import ScoreLog

Scores = dict[str, dict[str, Tensor]]  # by score and system: (P, S) of P prompts and S seeds, float64


def table_of(log: ScoreLog, scorers: Sequence[str], systems: Sequence[str], prompts: int, seeds: int) -> Scores:
    """Returns the scores of a finished log by name of the score and system.

    Raises UserError if two scorers give scores of one name.
    """
    table: Scores = {}
    given_by: dict[str, str] = {}
    for scorer in scorers:
        for (system, number, seed), values in log.scores[scorer].items():
            if system in systems and number < prompts and seed < seeds:
                for name, value in values.items():
                    if given_by.setdefault(name, scorer) != scorer:
                        raise UserError(f"--scorers: {given_by[name]} and {scorer} both give {name}; leave one out")
                    empty = torch.full((prompts, seeds), torch.nan, dtype=torch.float64)
                    table.setdefault(name, {}).setdefault(system, empty)[number, seed] = value
    return {name: {system: by_system[system] for system in systems} for name, by_system in table.items()}


def results_of(table: Scores) -> dict[str, dict[str, dict]]:
    """Returns by score and system its mean; for all but the first system also the paired change and the win rate.

    direction: +1 rose, -1 fell, 0 neither is shown (compare.beyond_chance, corrected over all comparisons together).
    wins: share of images that are better than the base's from the same noise, ties one half; its interval is Wilson's
    for as many answers as there are prompts, which is wide where a prompt has several images.
    """
    results: dict[str, dict[str, dict]] = {}
    tested = {}
    for name, by_system in table.items():
        (first, base), *others = by_system.items()
        results[name] = {first: {"mean": base.mean().item()}}
        for system, tuned in others:
            row = paired_delta(base.mean(1), tuned.mean(1))
            tested[f"{name}/{system}"] = row
            rate = ((tuned > base).double() + 0.5 * (tuned == base)).mean().item()
            interval = wilson(rate, row["n"]) if row["n"] >= ENOUGH else None
            ties = (tuned == base).double().mean().item()
            wins = {"rate": rate, "ci95": interval, "ties": ties}
            change = {key: row[key] for key in ("delta", "ci95", "p", "n")}
            results[name][system] = {"mean": row["tuned"], **change, "wins": wins}
    for key, direction in beyond_chance(tested).items():
        name, _, system = key.rpartition("/")
        results[name][system]["direction"] = direction
    return results


def verdict(results: Mapping[str, Mapping[str, dict]], system: str) -> str:
    """Returns one sentence that says what is shown of a system, all comparisons taken together."""
    said = {1: [], -1: [], 0: []}
    for name, by_system in results.items():
        said[by_system[system]["direction"]].append(name)
    words = {1: "rose in", -1: "fell in", 0: "no change shown in"}
    parts = [f"{words[sign]} {', '.join(names)}" for sign, names in said.items() if names]
    return f"{system} against the base: {'; '.join(parts)}"
