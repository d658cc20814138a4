"""The paper's orders of rows, and whether tinyworld shows the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from strop.bench.tinyworld.tables.results import Difference, Results
from strop.bench.tinyworld.tables.rows import ABLATIONS, DEFAULT, Row
from strop.engine.evaluation.published import ROWS

FAMILIES = {"sd15": "SD-1.5", "sdxl": "SDXL"}
SURE = {1: "the same here", -1: "**the opposite here**", 0: "not told apart here"}


@dataclass(frozen=True, slots=True)
class Claim:
    """The paper has `better` above `worse` in PickScore; text: its figures."""

    better: Row
    worse: Row
    text: str


def pickscores(family: str) -> dict[str, float]:
    """Returns the PickScore that the paper reports, by method."""
    return {name: pickscore for name, pickscore, *_ in ROWS[family]}


def claims(methods: Sequence[Row]) -> Iterator[Claim]:
    """Yields the orders of methods in the paper's main tables, and of its ablations against the default."""
    for family, title in FAMILIES.items():
        scores = pickscores(family)
        known = sorted((row for row in methods if row.published in scores), key=lambda row: -scores[row.published])
        for better, worse in combinations(known, 2):
            figures = f"{scores[better.published]:.2f} and {scores[worse.published]:.2f}"
            yield Claim(better, worse, f"{title}: {better.title} above {worse.title}, {figures}")
    for changed, rows in ABLATIONS.items():
        for row in rows:
            if row.paper:
                figures = f", {DEFAULT.paper} and {row.paper}" if row.paper[0].isdigit() else ""
                yield Claim(DEFAULT, row, f"{changed} above {row.title}{figures}")


def verdicts(results: Results, methods: Sequence[Row]) -> Iterator[tuple[Claim, Difference | None, Difference | None]]:
    """Yields each claim with better - worse here, in PickScore and in quality; None where one has not been run."""
    for claim in claims(methods):
        yield claim, *(results.against(claim.better, claim.worse, score) for score in ("pickscore", "quality"))


def verdict(pickscore: Difference | None) -> str:
    return SURE[pickscore.sure] if pickscore else "not yet run"
