"""methods/rewards: what a reward must return; each that does not gets one sentence and exit code 2."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from strop.engine import train
from strop.engine.errors import UserError
from strop.engine.methods.rewards import Reward
from strop.engine.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
MODULE = """
import torch
nan = lambda device: lambda images, prompts: {"n": torch.full((len(images),), float("nan"))}
short = lambda device: lambda images, prompts: {"n": torch.zeros(1)}
plain = lambda device: lambda images, prompts: torch.zeros(len(images))
floats = lambda device: lambda images, prompts: {"n": [0.0] * len(images)}
two = lambda device: lambda images, prompts: {"a": images.mean((1, 2, 3)), "b": -images.mean((1, 2, 3))}
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "reward_modules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    "method, reward, words",
    [
        ("d3po", "reward_modules:nan", ["iteration 1", "NaN", "reward_modules:nan"]),
        ("ddpo", "reward_modules:nan", ["iteration 1", "NaN"]),
        ("d3po", "reward_modules:short", ["shape (1,)", "(4,)"]),
        ("d3po", "reward_modules:plain", ["tensor(", "dict"]),
        ("ddpo", "reward_modules:floats", ["n of list", "(2,)"]),
        ("ddpo", "reward_modules:two", ["a, b", "d3po"]),
        ("ddpo", "reward_modules:nothing", ["reward: reward_modules has no attribute nothing"]),
        ("ddpo", "hpsv3", ["reward: found no scorer 'hpsv3'"]),
    ],
)
def test_a_bad_reward_gets_one_sentence(method_recipe, modules, capsys, method, reward, words):
    with pytest.raises(SystemExit) as stopped:
        train.main(method_recipe(method, f"reward={reward}"))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert sentence.startswith("strop: ")
    assert [word for word in words if word not in sentence] == [], sentence


@pytest.mark.parametrize(
    "method, keys, words",
    [
        ("d3po", ["optim.micro_batch=3"], ["optim.micro_batch is 3", "1, 2, 4"]),
        ("d3po", ["optim.discount=0.9", "optim.micro_batch=1"], ["optim.micro_batch is 1", "one of 3"]),
        ("d3po", ["optim.pairs=3", "optim.micro_batch=1"], ["optim.pairs is 3", "rollout.prompts = 2"]),
        ("ddpo", ["optim.updates=3"], ["optim.updates is 3"]),
        ("ddpo", ["optim.micro_batch=3"], ["optim.micro_batch is 3", "divisor of 4"]),
        ("ddpo", ["optim.history=4"], ["optim.min_history is 16"]),
        ("ddpo", ["rollout.k=4"], ["rollout.k: method ddpo has no such key", "spo"]),
        ("gradspo", ["rollout.inner_steps=2"], ["rollout.inner_steps"]),
        ("spo", ["reward=judge"], ["reward: method spo has no such key", "d3po", "ddpo"]),
        ("spo", ["method=ppo"], ["method: found 'ppo'", "ddpo"]),
    ],
)
def test_keys_that_a_method_has_not_or_cannot_use_are_refused(method_recipe, capsys, method, keys, words):
    with pytest.raises(SystemExit) as stopped:
        train.main(method_recipe(method, *keys))
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence.count("\n") == 1
    assert [word for word in words if word not in sentence] == [], sentence


def test_a_reward_that_is_nan_for_some_is_left_out_and_counted():
    reward = Reward.__new__(Reward)
    finite = reward.check(torch.tensor([[1.0, math.nan, 2.0], [1.0, 1.0, math.inf]]), 0, ALONE)
    assert finite.tolist() == [True, False, False]


def test_images_are_scored_as_a_png_stores_them():
    seen = []
    reward = Reward.__new__(Reward)
    reward.spec, reward.single = "mine", True
    reward.scorer = lambda images, prompts: seen.append(images) or {"n": images.mean((1, 2, 3))}
    images = torch.linspace(-1.3, 1.3, 12).view(1, 3, 2, 2)
    assert reward(images, ["a"], SimpleNamespace()).shape == (1, 1)
    levels = (seen[0] + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-4
    assert (levels.min(), levels.max()) == (0, 255)


def test_the_error_of_a_reward_that_is_nothing_but_nan_names_the_iteration(tmp_path):
    reward = Reward.__new__(Reward)
    reward.spec, reward.run_dir = "mine", tmp_path
    with pytest.raises(UserError, match=r"iteration 4: reward: mine .* there is no checkpoint yet"):
        reward.check(torch.full((1, 2), math.nan), 3, ALONE)


def test_a_run_says_which_score_it_was_rewarded_by(method_recipe, modules, tmp_path, capsys):
    keys = ("reward=reward_modules:two", "evaluate.scorers=[reward_modules:two]", "run.iterations=1")
    train.main(method_recipe("d3po", *keys))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rewards"] == ["a", "b"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "a and b are what the policy was rewarded by" in report
    assert "only by the judge" in report
