"""strop.engine.methods.spo.thresholds: what is kept of known gaps, LPO's rising threshold, and a run that says so."""

import json
import math

import pytest
import torch

from strop.engine import train
from strop.engine.config.methods.spo import RolloutConfig
from strop.engine.methods.spo.pairs import is_sure
from strop.engine.methods.spo.thresholds import given_thresholds, keeping_thresholds, threshold_line
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

SEGMENTS = [range(1, 3), range(3, 4)]
GAPS = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])


def kept(gaps, threshold):
    """How many of the gaps are sure, as the rollout asks it."""
    scores = torch.stack([gaps, torch.zeros_like(gaps)])
    chosen = torch.tensor([[0], [1]]).expand(2, len(gaps))
    return int(is_sure(scores, chosen, threshold).sum())


@pytest.mark.parametrize("share", [0.125, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("by_timestep", [False, True])
def test_this_share_of_the_pairs_is_kept(share, by_timestep):
    """Of all together, or of each segment; steps of none have a threshold too, which nobody asks."""
    thresholds = keeping_thresholds(GAPS, SEGMENTS, share, by_timestep, steps=5)
    assert len(thresholds) == 5
    assert thresholds[1] == thresholds[2]
    counts = [kept(gaps, thresholds[segment.start]) for gaps, segment in zip(GAPS, SEGMENTS, strict=True)]
    if by_timestep:
        assert counts == [round(4 * share)] * 2
    else:
        assert sum(counts) == 8 * share
        assert thresholds[1] == thresholds[3]


def test_gaps_that_are_not_finite_or_huge_or_alike_do_no_harm():
    broken = torch.tensor([[math.nan, math.inf, 1.0, 2.0]])
    assert kept(broken[0, 2:], keeping_thresholds(broken, SEGMENTS[:1], 0.5, False, 4)[1]) == 1
    assert keeping_thresholds(torch.full((1, 4), 1e4), SEGMENTS[:1], 0.5, False, 4)[1] < 1
    assert keeping_thresholds(torch.zeros(1, 4), SEGMENTS[:1], 0.5, False, 4)[1] == 0
    assert keeping_thresholds(torch.full((1, 4), math.nan), SEGMENTS[:1], 0.5, False, 4)[1] == 0


@pytest.mark.parametrize("low, high", [(0.35, 0.5), (0.45, 0.6)])
def test_a_rising_threshold_is_that_of_the_released_code(low, high, alphas, golden):
    """Whose table has four digits."""
    schedule = Schedule(DDIMCoefficients.build(alphas, 20, 1.0, "epsilon"), 5.0)
    config = RolloutConfig(threshold=low, threshold_noisiest=high)
    tensors = golden("methods/case7_lpo_reward_model")
    expected = dict(
        zip(tensors["threshold/timesteps"].tolist(), tensors[f"threshold/sigma_{low}_{high}"].tolist(), strict=True)
    )
    found = given_thresholds(config, schedule)
    assert found == pytest.approx([expected[t] for t in schedule.t[:-1]], abs=5e-5)
    assert (found[0], found[-1]) == (pytest.approx(high), pytest.approx(low))
    assert given_thresholds(RolloutConfig(threshold=0.2), schedule) == [0.2] * 20


def test_a_run_says_what_its_share_came_to(recipe, tmp_path, capsys):
    train.main(recipe("rollout.keep=0.5", "run.iterations=2", "optim.lr=1e-30"))
    said = capsys.readouterr().out
    assert "which keeps 50% of 12 pairs of the base model" in said  # two prompts, three steps, two iterations
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kept"] == pytest.approx(0.5)
    assert f"threshold {records[-1]['threshold']:.3g}," in said
    seconds = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    parts = [value for stage, value in seconds.items() if stage.startswith("rollout/")]
    assert seconds["rollout"] >= sum(parts)  # those of the first look at the pairs too


def test_the_line_shows_a_span_by_timestep():
    thresholds = keeping_thresholds(GAPS, SEGMENTS, 0.5, True, 5)
    line = threshold_line(thresholds, SEGMENTS, 0.5, 8)
    assert line == "threshold 0.0997 to 0.762 by timestep, which keeps 50% of 8 pairs of the base model"
