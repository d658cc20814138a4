"""docs/configuration.md says what engine/config/ says."""

from pathlib import Path

import pytest

from strop.engine.config.docs import markdown
from strop.engine.config.find import config_class, names
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.settings import keys

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == markdown(), "the page is stale: run `make docs`"


@pytest.mark.parametrize("recipe", [*map(config_class, names()), JudgeTrainingConfig])
def test_every_key_has_a_row(recipe):
    rows = {line.split("`")[1] for line in markdown().splitlines() if line.startswith("| `")}
    assert set(keys(recipe)) <= rows


def test_no_row_lacks_a_meaning():
    assert not [line for line in markdown().splitlines() if line.endswith("|  |")]
