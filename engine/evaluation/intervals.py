"""How sure a share is: Wilson's interval for one rater, a bootstrap over raters and prompts for several, exact tests.

Ten raters who answer 300 pairs are not 3,000 independent answers: what answers have in common, a rater or a prompt, is
drawn anew as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a 95% interval
ENOUGH = 8  # prompts or questions; with fewer, nothing is said of chance
SURE = 0.05  # the p-value below which a change is beyond chance


def wilson(rate: float, count: int) -> list[float]:
    """Returns the 95% score interval (Wilson, 1927) of a rate among `count` independent answers, count >= 1.

    A rate in which ties count one half varies less than the binomial one that this assumes: the interval is then wide.
    """
    middle = (rate + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(rate * (1 - rate) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def binomial_p(hits: int, count: int) -> float:
    """Returns the exact two-sided p-value of `hits` among `count` tosses of a fair coin."""
    tail = sum(math.comb(count, k) for k in range(min(hits, count - hits) + 1))
    return min(1.0, float(2 * tail / 2**count))


def holm(p_values: list[float]) -> list[float]:
    """Returns Holm's adjusted p-values (1979), in the order of p_values."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def corrected(rows: Mapping[str, Mapping]) -> dict[str, float]:
    """Returns Holm's adjusted p-values of those rows that have a p, by their names."""
    tested = {name: row["p"] for name, row in rows.items() if row.get("p") is not None}
    return dict(zip(tested, holm(list(tested.values())), strict=True))


@dataclass(frozen=True, slots=True)
class Resampling:
    """B draws of raters and of prompts with replacement: how often each was drawn. raters (B, R), prompts (B, P).

    Both are drawn independently and an answer counts as often as their product says (the pigeonhole bootstrap: Owen,
    2007), which is on the safe side where raters or prompts hardly differ.
    """

    raters: np.ndarray
    prompts: np.ndarray

    @classmethod
    def draw(cls, raters: int, prompts: int, draws: int, rng: np.random.Generator) -> Resampling:
        """Draws `draws` times."""
        return cls(*(rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64) for n in (raters, prompts)))

    def totals(self, cells: np.ndarray) -> np.ndarray:
        """Returns the sums (B, O) of cells (O, R, P) in each draw."""
        return np.stack([((self.raters @ cell) * self.prompts).sum(1) for cell in cells], axis=1)


def percentiles(values: np.ndarray) -> list[float] | None:
    """Returns the 95% interval of draws (B,), those that are not a number left out; None where all are."""
    values = values[np.isfinite(values)]
    return [float(v) for v in np.quantile(values, (0.025, 0.975))] if len(values) else None


def bootstrap_p(values: np.ndarray, null: float) -> float:
    """Returns the two-sided p-value that belongs to the percentile interval of draws (B,); at least 2 / (B + 1)."""
    values = values[np.isfinite(values)]
    below, above = int((values <= null).sum()), int((values >= null).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(values)))
