"""docs/configuration.md says what engine/config/training.py says."""

from pathlib import Path

import pytest

from strop.engine.config.docs import markdown
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.settings import keys
from strop.engine.config.training import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "the page is stale: run `make docs`"


@pytest.mark.parametrize("recipe", [Config, JudgeTrainingConfig])
def test_every_key_has_a_row(recipe):
    rows = {line.split("`")[1] for line in markdown().splitlines() if line.startswith("| `")}
    assert set(keys(recipe)) <= rows


@pytest.mark.parametrize(
    "row",
    [
        "| `run.iterations` | integer | (required) | ≥ 1 |",
        "| `rollout.eta` | number | `1.0` | > 0, ≤ 1 |",
        "| `lora.target_modules` | list of text | `[to_q, to_k, to_v, to_out.0]` | length ≥ 1 |",
        "| `evaluate.examiner` | text or null | `null` |  |",
    ],
    ids=["required", "two bounds", "list", "optional"],
)
def test_row(row):
    assert row in markdown()


def test_default_of_a_whole_section_wins():
    """JudgeTrainingConfig has zero.stage 2 where the section's own default is 1."""
    assert markdown().count("| `zero.stage` | `1` or `2` | `1` |") == 1
    assert markdown().count("| `zero.stage` | `1` or `2` | `2` |") == 1


def test_no_row_lacks_a_meaning():
    assert not [line for line in markdown().splitlines() if line.endswith("|  |")]
