"""evaluation/monitor: which runs are warned of, when they end, and what is best, on evaluations made by hand."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from strop.engine.config.training import EvaluateConfig
from strop.engine.evaluation.drift import statistics
from strop.engine.evaluation.evaluator import Evaluation
from strop.engine.evaluation.monitor import Monitor

N = 16
PICTURES = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
NOISE = torch.linspace(-1, 1, N)


def evaluation(images=PICTURES, **raised):
    """Scores that are `raised` by so much against those of the base, a little more for some prompts than for others."""
    scores = {name: NOISE + by * (1 + 0.1 * NOISE.flip(0)) for name, by in raised.items()}
    return Evaluation(scores, statistics(images), images[:2])


def monitor_of(evaluations, folder, rewards=(), **options):
    """A monitor of a run whose evaluations after iterations 1, 2, ... are these; the first is the base's."""
    base, *later = evaluations
    evaluator = lambda name, count: later[int(name.rsplit(" ", 1)[1]) - 1]
    evaluator = type(
        "Evaluator",
        (),
        {"__call__": staticmethod(evaluator), "ranks": SimpleNamespace(first=True, size=1), "rewards": rewards},
    )()
    return Monitor(evaluator, base, EvaluateConfig(every=1, watched=N, **options), folder)


def measured(monitor, count):
    return [monitor.measure(done) for done in range(1, count + 1)]


BASE = evaluation(judge=0.0, quality=0.0)
GOOD = evaluation(judge=0.5, quality=0.3)
BETTER = evaluation(judge=0.9, quality=0.6)
HACKED = evaluation(judge=1.5, quality=-0.4)
GREY = evaluation(PICTURES + 0.8, judge=1.5, quality=0.0)
STILL = evaluation(judge=1.5, quality=0.0)


@pytest.mark.parametrize(
    "later, wrong",
    [
        ([GOOD, BETTER, BETTER], [0, 0, 0]),
        ([GOOD, HACKED, HACKED], [0, 1, 1]),
        ([GREY, GREY], [1, 1]),
        ([STILL, STILL], [0, 0]),  # nothing independent rose, but the pictures are what they were
        ([evaluation(PICTURES + 0.8, judge=1.5, quality=0.3)], [0]),  # a change of style that people like
        ([evaluation(judge=0.0, quality=-0.4)], [1]),  # worse, though the judge is not pleased either
        ([evaluation(judge=0.5, quality=0.0, pickscore=-0.4)], [0]),  # no witness, neither when it falls
        ([evaluation(PICTURES + 0.8, judge=1.5, quality=0.0, pickscore=1.5)], [1]),  # nor when it rises
    ],
    ids=[
        "healthy",
        "quality falls",
        "brighter only",
        "judge only",
        "style",
        "worse",
        "pickscore falls",
        "pickscore rises",
    ],
)
def test_what_is_wrong(later, wrong, tmp_path, capsys):
    monitor = monitor_of([evaluation(**dict.fromkeys(later[0].scores, 0.0)), *later], tmp_path)
    assert [record["wrong"] for record in measured(monitor, len(later))] == wrong
    assert not monitor.stopped
    assert ("evaluate.patience" in capsys.readouterr().err) == (sum(wrong) >= 2)


def test_a_run_that_goes_wrong_ends_and_knows_its_best(tmp_path, capsys):
    monitor = monitor_of([BASE, GOOD, BETTER, HACKED, HACKED], tmp_path, stop=True)
    first, second, *_ = measured(monitor, 3)
    assert not monitor.stopped
    measured_last = monitor.measure(4)
    assert monitor.stopped
    assert monitor.best == 2
    deviation = NOISE.std().item()
    quality, judge = (monitor.scores.index(name) for name in ("quality", "judge"))
    assert first["heldout"][quality].item() == pytest.approx(0.3, abs=1e-6)
    assert second["heldout_change"][judge].item() == pytest.approx(0.9 / deviation, rel=1e-5)
    assert measured_last["drift"].tolist() == pytest.approx([0] * 6 + [1, 1], abs=1e-5)
    warning = capsys.readouterr().err
    assert "quality" in warning
    assert "iteration 2" in warning
    with Image.open(tmp_path / "samples" / "000004.png") as grid:
        assert grid.size == (4 * 16, 16)


def test_a_resumed_run_goes_on_counting(tmp_path):
    labels = ("judge", "quality")
    whole = monitor_of([BASE, GOOD, HACKED, HACKED], tmp_path, stop=True)
    records = [
        {
            "iteration": done,
            "heldout_change": dict(zip(labels, record["heldout_change"].tolist(), strict=True)),
            "wrong": record["wrong"],
        }
        for done, record in enumerate(measured(whole, 3), 1)
    ]
    resumed = monitor_of([BASE, GOOD, HACKED, HACKED], tmp_path, stop=True)
    resumed.replay([{"iteration": 0}, *records[:2]])
    resumed.measure(3)
    assert resumed.past == [pytest.approx(past) for past in whole.past]
    assert (resumed.stopped, resumed.best) == (whole.stopped, whole.best) == (True, 1)


@pytest.mark.parametrize("other", ["quality", "pickscore"])
def test_what_is_best_is_decided_by_the_judge_only_without_an_independent_score(other, tmp_path):
    """A judge was trained from PickScore, whose score decides nothing: the two go opposite ways here."""
    scores = [(0.0, 0.0), (0.5, 0.9), (0.9, 0.5)]
    base, *later = (evaluation(**{"judge": judge, other: score}) for judge, score in scores)
    monitor = monitor_of([base, *later], tmp_path)
    measured(monitor, 2)
    assert monitor.best == {"quality": 1, "pickscore": 2}[other]
    low, high = evaluation(judge=0.5), evaluation(judge=0.9)
    monitor = monitor_of([evaluation(judge=0.0), low, high, low], tmp_path)
    measured(monitor, 3)
    assert monitor.best == 2


def test_nothing_is_measured_between_evaluations(tmp_path):
    monitor = monitor_of([BASE, GOOD], tmp_path)
    assert monitor.measure(0) == {}
    assert monitor.best is None


def test_what_the_policy_is_rewarded_by_is_no_witness(tmp_path):
    """Its fall is not wrong, and its rise saves no run whose pictures have strayed."""
    later = [evaluation(judge=0.0, quality=-0.4), evaluation(PICTURES + 0.8, judge=0.0, quality=1.5)]
    measured_of = lambda **rewards: [m["wrong"] for m in measured(monitor_of([BASE, *later], tmp_path, **rewards), 2)]
    assert measured_of() == [1, 0]
    assert measured_of(rewards={"quality"}) == [0, 1]
