"""`strop evaluate-judge`: a judge that knows the finished images is always right, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch

from strop.engine import judge_evaluation
from strop.engine.evaluate_judge import main
from strop.engine.evaluation.pools import Pools, share, spread, won


@pytest.mark.parametrize("sign, right", [(1, 1.0), (-1, 0.0)], ids=["knows", "knows and lies"])
def test_a_judge_that_knows_the_finished_images_is_always_right(sign, right, recipe, monkeypatch, tmp_path, capsys):
    """By the score that it knows; the other score, which is of the prompt alone, has only ties."""

    class Oracle:
        def score(self, candidates, cond):
            images = pools[0].finished(candidates.x, step_of[candidates.t], cond)
            return sign * images.mean((2, 3, 4))

    class WatchedPools(Pools):
        def __init__(self, *parts):
            super().__init__(*parts)
            pools.append(self)

    pools, step_of, build = [], {}, judge_evaluation.build_rollout

    def with_oracle(config, models):
        built = build(config, models)
        step_of.update({t: step for step, t in enumerate(built.schedule.t)})
        return replace(built, judge=Oracle())

    monkeypatch.setattr(judge_evaluation, "build_rollout", with_oracle)
    monkeypatch.setattr(judge_evaluation, "Pools", WatchedPools)
    main([*recipe(), "--prompts=3", "--steps=2", f"--out={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {t: (cell["share"], cell["pools"]) for t, cell in figures["brightness"].items()} == {
        "201": (right, 3), "0": (right, 3), "all": (right, 6),
    }  # fmt: skip
    assert {cell["share"] for cell in figures["words"].values()} == {0.5}
    assert re.search(rf"all +{right:.0%} .*50%", capsys.readouterr().out)


def test_the_steps_are_spread_and_ties_count_one_half():
    segments = [range(i, i + 1) for i in range(10)]
    assert [segment.start for segment in spread(segments, 4)] == [0, 3, 6, 9]
    assert spread(segments, 1) == segments[:1]
    assert spread(segments, 12) == segments
    images = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]]).view(2, 3, 1, 1, 1)
    found = won({"a": lambda side, prompts: {"value": side.flatten()}}, images, ["a", "b", "c"])
    assert found["value"].tolist() == [0, 0.5, 1]
    assert share(found["value"])["share"] == 0.5


BAD = {
    "no prompts": (["--prompts=0"], r"--prompts: found 0"),
    "no scorer": (["evaluate.scorers=[]"], r"evaluate\.scorers: found none"),
    "no folder": (["--out=nowhere/figures.json"], r"--out: nowhere/figures\.json"),
    "too many": (["--prompts=9"], r"evaluate\.prompts: found 9, expected 1 .*to 3 "),
}


@pytest.mark.parametrize("more, names", BAD.values(), ids=BAD)
def test_what_cannot_be_evaluated_is_refused(more, names, recipe, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*recipe(), *more])
    assert exit.value.code == 2
    assert re.search(names, capsys.readouterr().err)
