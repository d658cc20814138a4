"""strop.bench.judge_precision: its measures on scores by hand, two prompts of tinyworld, and the table of the page."""

import json

import pytest
import torch

from strop.bench import judge_precision
from strop.bench.judge_precision import agreement, measure, table
from strop.engine.config.find import load

ROOT = judge_precision.ROOT


def test_agreement_is_counted_in_pools():
    """Of four pools one has other ends, and another two neighbours the other way round; the second is not kept."""
    exact = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.2, 0.1, 0.0, -0.1], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]).T
    found = torch.tensor([[3.0, 4.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [4.0, 2.0, 2.0, 1.0], [8.0, 6.0, 4.0, 2.0]]).T
    measured = agreement(found, exact, threshold=0.5)
    taus = (4 / 6, -1, 5 / 30**0.5, 1)  # one pair of six the other way round, all of them, a tie, none
    assert measured == pytest.approx(
        {"best": 0.5, "worst": 0.75, "tau": sum(taus) / 4, "kept": 0.75, "kept_pair": 2 / 3}
    )


def test_all_judges_score_the_same_pools():
    config = load(ROOT / "configs" / "tinyworld.yaml", ["rollout.num_steps=4", "rollout.threshold=0"])
    record = json.loads(json.dumps(measure(config, {"step-aware": config.judge}, ["a red circle", "a blue square"])))
    assert record["pools"] == 2 * 4
    half, brain = (record["judges"]["step-aware"][dtype] for dtype in ("float16", "bfloat16"))
    assert 0.8 < half["tau"] <= 1
    assert half["kept"] == brain["kept"] == 1
    assert len(table(record).splitlines()) == 4


def test_the_page_has_the_table_of_the_last_measurement():
    record = json.loads(judge_precision.RESULT.read_text())
    assert table(record) in (ROOT / "docs" / "cost.md").read_text(), f"make it anew of {judge_precision.RESULT.name}"
