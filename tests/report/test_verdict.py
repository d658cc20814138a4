"""The verdict: what it claims of a run, what it warns of, and how rarely it does either without a cause."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from strop.engine.evaluation.compare import paired_delta
from strop.engine.evaluation.intervals import ENOUGH
from strop.engine.methods.judge_training import columns as judge_training
from strop.engine.methods.spo import columns as spo
from strop.engine.report.run import Run
from strop.engine.report.tables import by_change, score_rows
from strop.engine.report.verdict import verdict
from strop.engine.runtime.columns import SHORT

JUDGED = list(range(751, 0, -50))  # of 20 steps, those of tinyworld's recipe
DEMO = {  # the 14 iterations of tinyworld's demo
    "judge": [3.96, 4.22, 4.59, 5.31, 4.38, 4.64, 5.27, 5.34, 5.92, 5.22, 4.80, 5.87, 5.67, 4.84],
    "kept": [0.57, 0.57, 0.59, 0.43, 0.49, 0.55, 0.53, 0.45, 0.38, 0.34, 0.46, 0.42, 0.43, 0.45],
    "margin": [.0005, .0019, .0032, .0017, .0052, .0044, .0074, .0051, .0052, .0023, .0016, .0035, .0062, .0038],
    "accuracy": [0.62, 0.66, 0.71, 0.63, 0.72, 0.65, 0.75, 0.65, 0.61, 0.58, 0.58, 0.57, 0.66, 0.53],
    "clipped": [0.0] * 14,
    "grad_norm": [.057, .075, .071, .050, .057, .076, .080, .055, .060, .055, .058, .060, .053, .056],
}  # fmt: skip
COUNTS = dict(zip(map(str, JUDGED), (9, 9, 9, 8, 8, 7, 6, 6, 4, 3, 3, 2, 2, 1, 0, 0), strict=True))


def demo(**changes):
    """The records of the demo, with some of their series changed."""
    series = DEMO | changes
    return [
        {"iteration": i + 1, "pairs_per_t": {"951": 0} | COUNTS} | {name: values[i] for name, values in series.items()}
        for i in range(len(series["judge"]))
    ]


def scores(rng, count=64, **effects):
    """Held-out comparisons of as many prompts as `count`: by name how far the tuned model is from the base."""
    base = {name: rng.normal(0.5, 0.2, count) for name in effects}
    return {
        name: paired_delta(base[name], base[name] + rng.normal(effect, 0.1, count)) for name, effect in effects.items()
    }


def a_run(records, summary=None, **recipe):
    recipe = {"rollout": {"t_range": [0, 750 + 1]} | recipe.pop("rollout", {})} | recipe
    return Run(Path("run"), records, summary or {}, yaml.safe_dump(recipe))


def kinds(run, kind):
    return [finding.text for finding in verdict(run).findings if finding.kind == kind]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_good_run_is_said_to_be_good_and_by_which_independent_measure(rng):
    run = a_run(demo(), scores(rng, quality=0.3, alignment=0.0, judge=0.3) | {"heldout_prompts": 64})
    good = kinds(run, "good")
    assert kinds(run, "bad") == []
    assert [text.split(" rose")[0] for text in good] == ["Quality", "The judge's score"]
    assert "64 held-out prompts" in good[0]
    said = verdict(run)
    assert said.directions == {"quality": 1, "alignment": 0, "judge": 1}
    for words in ("quality", "the judge's score rose", "no warning signs"):
        assert words in said.headline
    assert any("independently of the judge" in text and "uality and alignment" in text for text in kinds(run, "open"))


def test_a_run_measured_by_its_judge_alone_says_so(rng):
    run = a_run(demo(), scores(rng, judge=0.3))
    assert "only by the judge" in verdict(run).headline
    assert any("only by the judge" in text for text in kinds(run, "open"))


def test_pickscore_is_no_witness_of_a_run_by_a_judge_that_was_trained_from_it(rng):
    alone = a_run(demo(), scores(rng, pickscore=0.3, judge=0.3))
    assert alone.independent == []
    assert "only by the judge" in verdict(alone).headline
    assert any("pickscore is not independent" in text for text in kinds(alone, "open"))
    assert verdict(alone).directions["pickscore"] == 1
    pleased = a_run(demo(), scores(rng, pickscore=0.3, quality=0.0, judge=0.3))
    (warning,) = kinds(pleased, "bad")
    assert "quality did not" in warning
    assert "pickscore" not in warning
    pleased.prompts.append({"scores": {name: {"base": 0.0, "tuned": 0.5} for name in pleased.compared}})
    assert by_change(pleased) == ("quality", [0])


def test_what_was_lost_and_what_pleases_the_judge_alone_are_warnings(rng):
    lost = a_run(demo(), scores(rng, quality=0.3, alignment=-0.2, judge=0.3))
    assert "alignment fell" in verdict(lost).headline
    assert "There are warning signs" in verdict(lost).headline
    (warning,) = kinds(a_run(demo(), scores(rng, quality=0.0, judge=0.3)), "bad")
    assert "quality did not" in warning


def test_an_interval_that_excludes_0_is_no_claim_where_many_scores_are_tested():
    """One of six scores has a p of 0.03: beyond chance alone, not among six."""
    row = {"base": 0.5, "tuned": 0.6, "delta": 0.1, "n": 64, "ci95": [0.01, 0.19], "p": 0.03}
    others = {f"score {i}": row | {"ci95": [-0.1, 0.3], "p": 0.5} for i in range(5)}
    assert verdict(a_run([], {"quality": row})).directions == {"quality": 1}
    assert set(verdict(a_run([], {"quality": row} | others)).directions.values()) == {0}


def test_too_few_prompts_and_too_few_iterations_claim_nothing(rng):
    few = a_run(demo(), scores(rng, ENOUGH - 1, quality=0.5, judge=0.5))
    assert "Too few" in verdict(few).headline
    assert {row[-1] for row in score_rows(few)} == {"too few to say"}
    short = a_run(demo()[: SHORT - 1], scores(rng, quality=0.5, judge=0.5))
    assert "Too short to judge" in verdict(short).headline
    for run in (few, short):
        assert {finding.kind for finding in verdict(run).findings} == {"open"}
        assert not any(words in verdict(run).headline for words in (" rose", " fell", "did not change"))


def test_a_summary_without_p_values_still_gets_a_report():
    row = {"base": 0.5, "tuned": 0.8, "delta": 0.3, "ci95": [0.2, 0.4]}
    run = a_run(demo(), {"quality": row, "judge": row})
    assert "not tested" in verdict(run).headline
    assert [finding.kind for finding in verdict(run).findings][:2] == ["open", "open"]
    assert score_rows(run)[0][-1] == "+0.200 to +0.400"


def test_an_unfinished_run_and_one_of_unmeasured_scores(rng):
    assert "not measured" in verdict(a_run(demo())).headline
    assert "logged iteration 14" in kinds(a_run(demo()), "open")[0]
    nulls = {"quality": {"base": None, "tuned": None, "delta": None, "n": 64, "ci95": None, "p": None}}
    assert "Quality on held-out prompts is not measured." in kinds(a_run(demo(), nulls), "open")


LATE = {"nonfinite": ["loss"]}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"margin": [-0.01] * 14}, "margin is -0.01"),
        ({"accuracy": [0.5] * 14}, "accuracy is 50%"),
        ({"accuracy": [*DEMO["accuracy"][:11], 0.44, 0.45, 0.43]}, "accuracy is 44%"),
        ({"grad_norm": [500.0] * 14}, "gradient norm is 500"),
        ({"grad_norm": [0.05 * 1.3**i for i in range(14)]}, "gradient norm has grown"),
        ({"grad_norm": [3.0 if i in (4, 7, 11) else v for i, v in enumerate(DEMO["grad_norm"])]}, "has 3 spikes"),
        ({"kept": list(np.linspace(0.6, 0.08, 14))}, "fallen to 12%"),
        ({"kept": [0.004] * 14}, "Only 0.4%"),
        ({"clipped": [0.61] * 14}, "61% of the log-ratios"),
        ({"judge": list(np.linspace(5, 4, 14))}, "the judge's score fell"),
        ({"judge": [*np.linspace(3, 6, 9), 3.3, 3.2, 3.1, 3.0, 3.1]}, "After the middle of the training"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_curve_that_is_not_healthy_is_warned_of(rng, changes, words):
    run = a_run(demo(**changes), scores(rng, quality=0.3, judge=0.3))
    assert [words in text for text in kinds(run, "bad")] == [True]
    assert "There are warning signs" in verdict(run).headline


@pytest.mark.parametrize(
    "agreement, words",
    [
        (np.linspace(0.6, 0.2, 14), "fallen by 0.3"),
        ([0.6, 0.6, 0.6] + [None] * 8 + [0.35, 0.3, 0.25], "fallen by 0.30"),
        ([0.08, -0.02, 0.1] + [None] * 11, "tau is 0.04"),
        ([0.05] + [None] * 13, ""),  # one audit is too few
        ([0.55, None, 0.5, 0.6] * 3 + [0.5, 0.45], ""),
        ([None] * 14, ""),
    ],
    ids=["falls", "fell", "low", "one", "healthy", "none"],
)
def test_an_auditor_that_disagrees_is_warned_of(rng, agreement, words):
    run = a_run(demo(agreement=list(agreement)), scores(rng, quality=0.3, judge=0.3))
    assert [words in text and "auditor" in text for text in kinds(run, "bad")] == [True] * bool(words)


def test_numbers_that_are_not_finite_are_warned_of_and_what_has_passed_is_not():
    records = demo()
    records[9] |= {"nonfinite": ["loss"]}
    (warning,) = kinds(a_run(records), "bad")
    assert "iteration 10, in loss" in warning
    passed = demo(clipped=[0.9] * 5 + [0.1] * 9, accuracy=[0.4] * 5 + [0.6] * 9, kept=[0.0] * 5 + [0.4] * 9)
    nulls = [dict.fromkeys(record) | {"iteration": record["iteration"]} for record in demo()]
    assert kinds(a_run(passed), "bad") + kinds(a_run(nulls), "bad") == []


def test_empty_rows_at_the_last_steps_are_explained_and_others_are_a_warning():
    assert [text for text in kinds(a_run(demo()), "open") if "t = 51 and 1," in text]
    holes = [record | {"pairs_per_t": record["pairs_per_t"] | {"601": 0}} for record in demo()]
    (warning,) = kinds(a_run(holes), "bad")
    assert "t = 601," in warning
    every_other = {"rollout": {"t_range": [0, 751], "judge_every": 2}}
    halved = [
        record | {"pairs_per_t": {t: n if JUDGED.index(int(t)) % 2 == 0 else 0 for t, n in COUNTS.items()}}
        for record in demo()
    ]
    assert kinds(a_run(halved, **every_other), "bad") == []
    assert a_run(halved, **every_other).judged_timesteps == JUDGED[::2]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"loss": lambda i: 0.5 + 0.01 * i}, "the loss rose"),
        ({"accuracy": lambda i: 0.5}, "pairs trained on is 50%"),
        ({"heldout_accuracy": lambda i: {"0": 0.5, "951": 0.5}}, "at t = 0"),
        ({"heldout_accuracy": lambda i: {"0": 0.9 - 0.01 * i, "951": 0.6}}, "below its best"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_training_of_a_judge_is_warned_of_in_the_same_way(values, words):
    healthy = {
        "loss": lambda i: 0.6 - 0.01 * i,
        "accuracy": lambda i: 0.7,
        "grad_norm": lambda i: 2.0,
        "heldout_accuracy": lambda i: {"0": 0.7 + 0.01 * i, "951": 0.55},
    }

    def texts(columns):
        records = [{"iteration": i} | {name: value(i) for name, value in columns.items()} for i in range(1, 31)]
        return kinds(a_run(records, data={"source": "pairs"}), "bad")

    assert texts(healthy) == []
    assert [words in text for text in texts(healthy | values)] == [True]


@pytest.mark.parametrize("columns", [spo.COLUMNS, judge_training.COLUMNS], ids=["spo", "judge"])
def test_whatever_a_curve_calls_healthy_is_checked(columns):
    assert [c.name for c in columns if c.drawn and c.drawn.healthy and not (c.signs or c.trend)] == []


def a_null_run(rng):
    """A run with healthy curves and their noise, whose held-out scores differ by noise alone; one is a rate."""
    length, prompts = int(rng.integers(SHORT, 120)), int(rng.choice([16, 64, 384]))
    noise = {name: rng.normal(0, 1, length) for name in ("judge", "kept", "margin", "accuracy", "clipped")}
    series = {
        "judge": 5 + 0.5 * noise["judge"],
        "kept": np.clip(0.45 + 0.07 * noise["kept"], 0, 1),
        "margin": 0.004 + 0.003 * noise["margin"],
        "accuracy": np.clip(0.62 + 0.06 * noise["accuracy"], 0, 1),
        "clipped": np.clip(0.2 + 0.05 * noise["clipped"], 0, 1),
        "grad_norm": 0.06 * np.exp(rng.normal(0, 0.35, length)),
    }
    records = [
        {name: values[i] for name, values in series.items()}
        | {"iteration": i + 1, "pairs_per_t": {t: int(rng.poisson(n)) for t, n in COUNTS.items()}}
        for i in range(length)
    ]
    taste = rng.normal(0, 0.1, prompts)  # what quality and judge have in common
    compared = scores(rng, prompts, alignment=0.0) | {
        name: paired_delta(torch.zeros(prompts), taste + rng.normal(0, 0.1, prompts)) for name in ("quality", "judge")
    }
    right = rng.random((2, prompts)) < 0.8
    return a_run(records, compared | {"counting": paired_delta(*right.astype(float))})


def false_alarms(seed, runs):
    rng = np.random.default_rng(seed)
    said = [verdict(a_null_run(rng)).findings for _ in range(runs)]
    return sum(any(finding.kind != "open" for finding in findings) for findings in said)


def test_runs_in_which_nothing_changed_are_rarely_said_to_have_changed():
    assert false_alarms(seed=1, runs=200) <= 0.05 * 200
