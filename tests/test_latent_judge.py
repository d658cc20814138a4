"""Runs with a judge that reads noisy latents: what the rollout then leaves out, for both families and other methods."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from strop.engine import train, train_judge
from strop.engine.config.find import load
from strop.engine.config.judge_training import JudgeTrainingConfig, TrainedJudgeConfig
from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.errors import UserError
from strop.engine.judge.find import load_judge
from strop.engine.judge.latent_files import begin, save
from strop.engine.judge_training import build
from strop.engine.methods.spo.rollout import Rollout
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.session import Session

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def judge_of(tmp_path_factory):
    """judge_of(folder) -> the folder of a latent judge of this base model, with random projections."""

    def make(folder):
        model, out = ModelConfig(path=str(folder)), tmp_path_factory.mktemp("latent-judge")
        diffusion, rng = LatentDiffusion.load(model, CPU), torch.Generator().manual_seed(0)
        judge = begin(TrainedJudgeConfig(kind="latent"), model, diffusion, rng)
        judge.network.logit_scale.data.fill_(math.log(100))
        save(out, judge)
        return out

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


@pytest.fixture
def latent_recipe(file_recipe):
    """latent_recipe(form, folder, ...) -> the command line of a latent judge's training on 32 pairs in files."""
    keys = ("optim.steps=4", "optim.num_steps=20", "judge.path=null", "judge.kind=latent")
    return lambda form, folder, *overrides: file_recipe(form, *keys, f"model.path={folder}", *overrides)


@pytest.mark.parametrize(
    "family, form, overrides",
    [
        ("sd15", "jsonl", ("judge.guidance=7.5", "optim.accumulate=2")),
        ("sdxl", "parquet", ("judge.lora_rank=2", "data.labels=distilled", "model.dtype=bfloat16")),
    ],
    ids=["sd15", "sdxl, a LoRA, distilled"],
)
def test_one_is_trained_goes_on_and_judges(
    family, form, overrides, latent_recipe, recipe, clip_folder, tiny_folder, tiny_sdxl_folder, tmp_path
):
    """Its training resumes bit for bit, from latents that are computed once, and leaves a judge that a run reads."""
    folder, run = (tiny_folder if family == "sd15" else tiny_sdxl_folder), tmp_path / "run"
    overrides += (
        "run.save_every=2",
        f"labeller.path={clip_folder if 'data.labels=distilled' in overrides else 'null'}",
    )
    arguments = latent_recipe(form, folder, *overrides)
    train_judge.main(arguments)
    assert not (tmp_path / "cache" / "text").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines[1:])
    whole = files_of(run / "judge")
    assert ("unet" in {name.split("/")[0] for name in whole}) == (family == "sd15")
    shutil.rmtree(run / "checkpoints" / "000004")
    shutil.rmtree(run / "judge")
    train_judge.main([*arguments, "run.resume=true"])
    assert files_of(run / "judge") == whole
    keys = (f"model.path={folder}", f"judge.path={run / 'judge'}", "judge.kind=latent", "run.iterations=1")
    train.main(recipe(*keys, f"run.dir={tmp_path / 'policy'}"))
    summary = json.loads((tmp_path / "policy" / "summary.json").read_text())
    assert summary["judge"]["delta"] != 0


def files_of(folder):
    """The contents of a folder's files by their names in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_timesteps_are_a_samplers_and_noise_is_each_images_own(latent_recipe, tiny_folder):
    path, *overrides = latent_recipe("jsonl", tiny_folder)
    method, _ = build(Session(load(path, overrides, JudgeTrainingConfig), Ranks(0, 1, CPU)))
    assert sorted(method.timesteps.tolist()) == list(range(1, 1000, 50))
    mean = torch.zeros(2, 3, 4, 8, 8)
    t = torch.tensor([951, 501, 1])
    seen = method.views.noised(mean, mean, None, t, torch.Generator().manual_seed(0))
    scale = (1 - method.views.noiser.alphas[t]).sqrt()
    assert (seen.std((2, 3, 4)) / scale - 1).abs().max() < 0.25
    assert (seen[0] - seen[1]).std((1, 2, 3)).div(scale).min() > 1.0, "sqrt(2), where noise that is shared has 0"
    clean = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    posterior = method.diffusion.posterior(clean)
    assert torch.equal(
        method.views.scored(clean, posterior, 0, None, None), posterior[0] * method.diffusion.vae.config.scaling_factor
    )


BAD = {
    "a LoRA of another kind": (("judge.kind=spm", "judge.lora_rank=2"), r"judge.*lora_rank"),
    "no path for another kind": (("judge.kind=spm",), r"judge.*path is null"),
    "no labeller": (("data.labels=distilled",), r"labeller\.path is null"),
    "labels are given": (("labeller.path=x",), r"data\.labels is given"),
    "no such labeller": (("data.labels=distilled", "labeller.path=nowhere"), r"labeller\.path: no such file.*nowhere"),
    "no such CLIP": (("judge.components=nowhere",), r"judge\.components: no such file.*nowhere"),
}


@pytest.mark.parametrize("overrides, names", BAD.values(), ids=BAD)
def test_a_training_that_cannot_be_is_refused(overrides, names, latent_recipe, tiny_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train_judge.main(latent_recipe("jsonl", tiny_folder, *overrides))
    assert exit.value.code == 2
    assert re.search(names, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_judge_with_another_rank_of_lora_is_not_trained_further(latent_recipe, judge_of, tiny_folder, capsys):
    with pytest.raises(SystemExit):
        train_judge.main(
            latent_recipe("jsonl", tiny_folder, f"judge.path={judge_of(tiny_folder)}", "judge.lora_rank=2")
        )
    assert re.search(r"judge\.lora_rank: found 2, but .* was trained with None", capsys.readouterr().err)


def test_guidance_of_another_kind_of_judge_is_refused(clip_folder, tiny_folder):
    model = ModelConfig(path=str(tiny_folder))
    judge = JudgeConfig(path=str(clip_folder), kind="pickscore", guidance=2.0)
    with pytest.raises(UserError, match=r"judge\.guidance: found 2\.0.*latent"):
        load_judge(judge, model, LatentDiffusion.load(model, CPU), None)


@pytest.mark.parametrize("method, judge", [("spo", "latent"), ("gradspo", "pixel")])
def test_an_auditor_changes_no_bit_and_a_resumed_run_audits_as_a_whole_one(
    method, judge, method_recipe, judge_of, clip_folder, tiny_folder, tmp_path, capsys
):
    """The auditor is of the other kind than the judge. Of three iterations the first and the third are audited."""
    kinds = {"latent": (judge_of(tiny_folder), "latent"), "pixel": (clip_folder, "pickscore")}
    (path, kind), (auditor, other) = kinds.pop(judge), *kinds.values()
    common = (f"judge.path={path}", f"judge.kind={kind}", "rollout.k=3", "run.iterations=3")
    audit = (f"audit.path={auditor}", f"audit.kind={other}", "audit.every=2", "audit.prompts=1")
    runs = {"plain": (), "audited": audit, "resumed": (*audit, "run.resume=true")}
    for name, keys in runs.items():
        if name == "resumed":  # after the second iteration
            shutil.copytree(tmp_path / "audited", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints" / "000003")
        train.main(method_recipe(method, *common, *keys, f"run.dir={tmp_path / name}"))
    states = [load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in runs]
    assert all(torch.equal(value, state[name]) for state in states for name, value in states[0].items())
    plain, audited, resumed = (read_records(tmp_path / name / "metrics.jsonl") for name in runs)
    assert not any("agreement" in record for record in plain)
    taus = [record["agreement"] for record in audited]
    assert taus == [record["agreement"] for record in resumed]
    assert taus[1] is None
    assert all(-1 <= tau <= 1 for tau in (taus[0], taus[2]))
    assert "Judge and auditor, Kendall" in (tmp_path / "audited" / "report.html").read_text()
    assert "auditor, Kendall" not in (tmp_path / "plain" / "report.html").read_text()
    assert str(auditor)[-60:] in capsys.readouterr().out


def test_a_judge_agrees_with_itself(recipe, clip_folder, tmp_path):
    train.main(recipe(f"audit.path={clip_folder}", "audit.kind=pickscore", "audit.every=1", "rollout.k=3"))
    assert [record["agreement"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1.0, 1.0]
