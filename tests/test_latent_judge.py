"""Runs with a judge that reads noisy latents: what the rollout then leaves out, for both families and other methods."""

import json

import pytest
import torch

from strop.bench.judge_precision import write_random_judge
from strop.engine import train
from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.errors import UserError
from strop.engine.judge.find import load_judge
from strop.engine.methods.spo.rollout import Rollout
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def judge_of(tmp_path_factory):
    """judge_of(folder) -> the folder of a latent judge of this base model, with random projections."""

    def make(folder):
        return write_random_judge(ModelConfig(path=str(folder)), tmp_path_factory.mktemp("latent-judge"))

    return make


@pytest.mark.parametrize("family, guidance", [("sd15", 1.0), ("sdxl", 7.5)])
@pytest.mark.parametrize("inner_steps", [1, 2], ids=["spo", "mspo"])
def test_neither_a_look_ahead_nor_a_decode_is_made(
    family, guidance, inner_steps, recipe, judge_of, tiny_folder, tiny_sdxl_folder, tmp_path, monkeypatch
):
    """The UNet runs on one latent a prompt and step; inside a segment of several steps on each branch. The last three
    of five steps are forked, in segments of one step, or of two and one."""
    folder = tiny_folder if family == "sd15" else tiny_sdxl_folder
    rows, rolling = [], []
    rollout, eps, decode = Rollout.__call__, Policy.eps, LatentDiffusion.decode

    def watched_rollout(self, cond, rng):
        rolling.append(True)
        outcome = rollout(self, cond, rng)
        rolling.clear()
        return outcome

    def watched_eps(self, x, *args, **options):
        rows.extend([len(x)] * bool(rolling))
        return eps(self, x, *args, **options)

    def watched_decode(self, latents):
        assert not rolling
        return decode(self, latents)

    monkeypatch.setattr(Rollout, "__call__", watched_rollout)
    monkeypatch.setattr(Rollout, "look_ahead", lambda *_: pytest.fail("the judge looks at no prediction"))
    monkeypatch.setattr(Policy, "eps", watched_eps)
    monkeypatch.setattr(LatentDiffusion, "decode", watched_decode)
    keys = (f"judge.path={judge_of(folder)}", "judge.kind=latent", f"judge.guidance={guidance}")
    run = (f"model.path={folder}", "run.iterations=1", f"rollout.inner_steps={inner_steps}")
    train.main(recipe(*keys, *run))
    shared, each = 2, 4  # rows of the UNet: a latent a prompt, and a latent a branch
    assert rows == ([shared] * 5 if inner_steps == 1 else [shared, shared, shared, each, shared])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["judge"]["delta"] != 0


@pytest.mark.parametrize("method", ["d3po", "ddpo", "gradspo"])
def test_it_rewards_other_methods(method, method_recipe, judge_of, tiny_folder, tmp_path):
    keys = (f"judge.path={judge_of(tiny_folder)}", "judge.kind=latent", "run.iterations=1")
    train.main(method_recipe(method, *keys))
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_guidance_of_another_kind_of_judge_is_refused(clip_folder, tiny_folder):
    model = ModelConfig(path=str(tiny_folder))
    judge = JudgeConfig(path=str(clip_folder), kind="pickscore", guidance=2.0)
    with pytest.raises(UserError, match=r"judge\.guidance: found 2\.0.*latent"):
        load_judge(judge, model, LatentDiffusion.load(model, CPU))
