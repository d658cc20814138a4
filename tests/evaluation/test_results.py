"""evaluation/results and gallery: what a table of scores shows, which prompts are chosen, and names that must agree."""

import pytest
import torch

from strop.engine.evaluation.compare import paired_delta
from strop.engine.evaluation.gallery import LIMIT, chosen
from strop.engine.evaluation.intervals import wilson
from strop.engine.evaluation.results import results_of, verdict
from strop.engine.scorers import find, names


@pytest.fixture
def table():
    """A score that rises by much, one that does not change, both of 40 prompts and two images each."""
    base = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return {
        "up": {"base": base, "a": base + 1 + 0.1 * noise, "b": base},
        "same": {"base": base, "a": base + 0.1 * (noise - noise.mean()), "b": base.flip(0)},
    }


def test_a_prompt_is_one_answer_and_ties_count_one_half(table):
    results = results_of(table)
    expected = paired_delta(table["up"]["base"].mean(1), table["up"]["a"].mean(1))
    row = results["up"]["a"]
    assert {key: row[key] for key in ("delta", "ci95", "p", "n")} == {
        k: expected[k] for k in ("delta", "ci95", "p", "n")
    }
    assert row["n"] == 40
    assert row["wins"] == {"rate": 1.0, "ci95": wilson(1.0, 40), "ties": 0.0}
    assert results["up"]["b"]["wins"]["rate"] == 0.5
    assert results["up"]["b"]["wins"]["ties"] == 1
    assert [results[name][system]["direction"] for name in table for system in "ab"] == [1, 0, 0, 0]
    assert verdict(results, "a") == "a against the base: rose in up; no change shown in same"


def test_the_gallery_has_the_extremes_of_each_score_and_a_sample():
    base = torch.zeros(500, 1)
    changes = {
        name: torch.randn(500, 1, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("xy")
    }
    numbers = chosen({name: {"base": base, "a": change} for name, change in changes.items()}, 500)
    assert len(numbers) == LIMIT
    assert {0, 499} <= set(numbers)
    for change in changes.values():
        order = change.flatten().argsort().tolist()
        assert {*order[:8], *order[-8:]} <= set(numbers)
    assert chosen({}, 5) == [0, 1, 2, 3, 4]


def test_names_are_those_of_the_loaders():
    assert tuple(find.LOADERS) == names.NAMES
