"""strop.bench.precision on tinyworld, one iteration: half precision is noisier the fewer digits it has."""

import json

import pytest

from strop.bench import precision
from strop.engine.config.find import load

ROOT = precision.ROOT


@pytest.fixture(scope="module")
def record():
    overrides = ["rollout.prompts=2", "rollout.num_steps=6", "rollout.threshold=0", "optim.lr=0.02"]
    return precision.measure(load(ROOT / "configs" / "tinyworld.yaml", overrides), 1)


def test_noise_grows_as_digits_go(record):
    single, half, brain = (record["log_ratio"][name] for name in ("float32", "float16", "bfloat16"))
    assert single["pairs"] == half["pairs"] > 0
    assert single["noise_to_signal"] == 0
    assert single["same_sign"] == 1
    assert 0 < half["noise_to_signal"] < brain["noise_to_signal"]
    assert half["gradient_cosine"] > brain["gradient_cosine"] > 0.99


def test_the_table(record):
    lines = precision.table(json.loads(json.dumps(record))).splitlines()
    assert lines[2].startswith("| float32 | 0 | 100.0% | 1.0")
    assert len(lines) == 5


def test_the_page_has_the_table_of_the_last_measurement():
    record = json.loads((ROOT / "bench" / "results" / "precision_tinyworld.json").read_text())
    assert precision.table(record) in (ROOT / "docs" / "cost.md").read_text(), (
        "make it anew of precision_tinyworld.json"
    )
