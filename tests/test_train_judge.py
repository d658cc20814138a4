"""Judge training from the recipe to the run folder, on the golden models and pairs that a tiny judge can learn."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import CLIPModel

from strop.engine import train_judge
from strop.engine.config.find import load
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.training import JudgeConfig
from strop.engine.data.pair_cache import PairCache
from strop.engine.errors import UserError
from strop.engine.evaluation.compare import rate_delta
from strop.engine.judge.heldout import TIMESTEPS
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.judge_training import build
from strop.engine.methods.judge_training.method import JudgeTraining
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.session import Session
from strop.engine.speed.upsample import FoldedUpsample
from strop.engine.train_judge import main

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def recipe(recipe):
    """recipe("optim.steps=3") -> the command line of a judge's training in tmp_path/run."""
    return functools.partial(recipe, judge=True)


def built(arguments):
    """Method and optimizer of a run that is not begun."""
    path, *overrides = arguments
    return build(Session(load(path, overrides, JudgeTrainingConfig), ALONE))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(judge_run, recipe):
    run = judge_run.folder
    path, *overrides = recipe(f"run.dir={run}")
    assert load(run / "config.yaml", cls=JudgeTrainingConfig) == load(path, overrides, JudgeTrainingConfig)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000004", "000006"]
    assert all((run / name).stat().st_size > 0 for name in ("curves.png", "report.html"))
    assert list((run / "tensorboard").iterdir())
    lines = records(run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 4, 5, 6]
    assert (lines[-1]["pairs"], lines[-1]["optimizer_steps"]) == (48, 6)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines[1:])
    assert list(lines[0]["heldout_accuracy"]) == [str(t) for t in TIMESTEPS]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"] == {"before": lines[0]["heldout_accuracy"], "after": lines[-1]["heldout_accuracy"]}
    assert (summary["pairs"], summary["iterations"], summary["heldout_pairs"]) == (48, 6, 20)
    for t in map(str, TIMESTEPS):
        rates = (lines[at]["heldout_accuracy"][t] for at in (0, -1))
        assert summary[f"accuracy at t={t}"] == rate_delta(*rates, 17), "three of the held-out pairs are ties"
    assert {"total", "load", "prepare", "evaluate", "show", "update", "save"} == summary["seconds"].keys()
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(run / "judge")), ALONE.device)
    assert judge.clip.vision_model.adaLN_modulation[1].weight.abs().max() > 0


def test_the_terminal_says_what_the_records_say(judge_run):
    summary = json.loads((judge_run.folder / "summary.json").read_text())
    shown = judge_run.printed.splitlines()
    assert all(number in shown[0].split() for number in ("40", "20", "0")), "pairs to train on, held out, left out"
    timesteps = [f"t={t}" for t in TIMESTEPS]
    assert shown[1].split() == ["iteration", "ETA", "loss", "accuracy", *timesteps, "grad", "norm"]
    assert [line.split()[0] for line in shown[2:8]] == ["0/6", "1/6", "2/6", "4/6", "5/6", "6/6"]
    written = {name: [f"{value:.3f}" for value in values.values()] for name, values in summary["accuracy"].items()}
    assert shown[7].split()[4:-1] == written["after"]
    assert [line.split()[3] for line in shown if line.startswith("accuracy at t=")] == written["before"]
    assert ["judge", str(judge_run.folder / "judge")] in map(str.split, shown)


def test_every_parameter_is_trained(judge_run, clip_folder):
    before = load_file(clip_folder / "model.safetensors")
    after = load_file(judge_run.folder / "judge" / "model.safetensors")
    assert before.keys() < after.keys()
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved <= {"vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"}


def test_steps_on_a_fixed_batch_lower_its_loss(recipe):
    method, optimizer = built(recipe())
    shown = method.show(next(iter(DataLoader(method.sets.train, batch_size=16))), clean=4)
    losses = []
    for _ in range(12):
        loss, stats = method.loss(shown)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(stats["loss"].item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_judge_never_told_the_timestep_is_trained_and_known_as_such(recipe, tmp_path):
    main(recipe("judge.kind=spm_no_step", "optim.steps=2", "optim.warmup=0"))
    path = str(tmp_path / "run" / "judge")
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=path, kind="spm_no_step"), ALONE.device)
    image, text = torch.zeros(1, 1, 3, 16, 16), judge.encode(["ab"])
    assert judge.clip.vision_model.adaLN_modulation[1].weight.any()
    assert torch.equal(judge.score_images(image, text, 951), judge.score_images(image, text, 1))
    with pytest.raises(UserError, match=r"^judge\.kind: found spm, but .* is a judge of kind spm_no_step"):
        StepAwarePreferenceModel.load(JudgeConfig(path=path), ALONE.device)


def test_an_untrained_judge_is_as_right_as_its_pickscore(judge_run, clip_folder, tokenizer):
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    pairs = sys.modules["recipe_modules"].pairs(43, 20)
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore"), ALONE.device)
    ids = tokenizer(["ab"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    right = []
    for pair in (pair for pair in pairs if pair["label_0"] != 0.5):
        pixels = judge.pixels(torch.stack([pair["image_0"], pair["image_1"]]))
        with torch.no_grad():
            scores = clip(input_ids=ids, pixel_values=pixels).logits_per_text[0]
        right.append((scores[0] > scores[1]).item() == (pair["label_0"] == 1))
    assert records(judge_run.folder)[0]["heldout_accuracy"]["0"] == pytest.approx(sum(right) / len(right))


def test_another_seed_gives_other_bits(judge_run, recipe, tmp_path):
    """That the same one gives the same, also over a resumption, test_a_resumed_run_goes_on_bit_for_bit says."""
    main(recipe("run.seed=2", "optim.steps=1", "optim.warmup=0"))
    assert records(judge_run.folder)[1]["loss"] != records(tmp_path / "run")[1]["loss"]


def test_clean_share_shows_that_many_pairs_as_they_are(recipe, monkeypatch):
    seen, show = [], JudgeTraining.show

    def watch(self, pairs, clean):
        shown = show(self, pairs, clean)
        as_they_are = torch.stack([pairs["image_0"], pairs["image_1"]])[:, :clean]
        clean_pixels = self.judge.pixels(as_they_are.flatten(0, 1)).view_as(shown.seen[:, :clean])
        assert (shown.seen[:, :clean] - clean_pixels).abs().max() < 1e-5 if clean else True
        assert (shown.t[:clean] == 0).all()
        assert len(set(shown.t[clean:].tolist())) == len(shown) - clean, "each pair has a timestep of its own"
        seen.append((clean, (shown.t[clean:] > 0).float().mean().item()))
        return shown

    monkeypatch.setattr(JudgeTraining, "show", watch)
    main(recipe("optim.clean_share=0.3", "optim.steps=5", "run.save_every=5"))
    assert [clean for clean, _ in seen] == [2, 2, 3, 2, 3]  # 0.3 of 40
    assert all(noised > 0.8 for _, noised in seen)


def test_bfloat16_models_keep_a_float32_judge(recipe, tmp_path):
    main(recipe("model.dtype=bfloat16", "optim.steps=3"))
    assert {t.dtype for t in load_file(tmp_path / "run" / "judge" / "model.safetensors").values()} == {torch.float32}
    assert all(line["loss"] > 0 for line in records(tmp_path / "run")[1:])


def judge_of(run):
    return load_file(run / "judge" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "family, form, labels",
    [("sd15", "jsonl", "given"), ("sdxl", "parquet", "pickscore")],
)
def test_pairs_in_files_are_trained_on_and_computed_once(
    file_recipe, tmp_path, request, monkeypatch, capsys, family, form, labels
):
    folder = request.getfixturevalue({"sd15": "tiny_folder", "sdxl": "tiny_sdxl_folder"}[family])
    encoded, posterior = [], LatentDiffusion.posterior
    monkeypatch.setattr(LatentDiffusion, "posterior", lambda self, x: encoded.append(x.shape[1]) or posterior(self, x))
    arguments = file_recipe(form, f"model.path={folder}", f"data.labels={labels}")
    main(arguments)
    assert sum(encoded) == 12 + 6  # three steps of four pairs, and the held-out ones
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["training_pairs"], summary["heldout_pairs"], summary["pairs"]) == (12, 6, 12)
    assert summary["broken_pairs"] == {"count": 0, "such_as": []}
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in records(tmp_path / "run")[1:])
    assert not (tmp_path / "run" / "broken.txt").exists()
    texts = load_entry(next((tmp_path / "cache" / "text").rglob("*.entry")))
    assert texts.keys() == ({"text", "pooled"} if family == "sdxl" else {"text"})

    encoded.clear()
    main([*arguments, f"run.dir={tmp_path / 'again'}", "data.workers=2"])
    assert encoded == [4, 2]  # the held-out pairs alone
    assert same(judge_of(tmp_path / "again"), judge_of(tmp_path / "run"))


def load_entry(path):
    return PairCache(path.parents[2]).read(path)


def test_the_cache_changes_nothing_but_rounding(file_recipe, tmp_path):
    for name, cache in (("cached", tmp_path / "cache"), ("live", "null")):
        main(file_recipe("jsonl", f"data.cache={cache}", f"run.dir={tmp_path / name}", "run.log_every=1"))
    cached, live = (records(tmp_path / name) for name in ("cached", "live"))
    assert [line["loss"] for line in cached[1:]] == pytest.approx([line["loss"] for line in live[1:]], rel=0.02)
    assert cached[0]["heldout_accuracy"] == live[0]["heldout_accuracy"]


@pytest.mark.parametrize("key", ["fold_upsample", "channels_last"])
def test_a_key_of_speed_reaches_the_networks(recipe, key):
    method, _ = built(recipe("model.fold_upsample=false", f"model.{key}=true"))
    for network in (method.views.unet, method.diffusion.vae):
        folded = any(isinstance(module, FoldedUpsample) for module in network.modules())
        ordered = all(w.is_contiguous(memory_format=torch.channels_last) for w in network.parameters() if w.ndim == 4)
        assert (folded, ordered) == (key == "fold_upsample", key == "channels_last")


@pytest.mark.slow
def test_a_judge_is_trained_compiled(judge_run, recipe, tmp_path, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *what, **options: whole(*what, **options | {"backend": "eager"}))
    torch._dynamo.reset()
    counted = counters["stats"]["unique_graphs"]
    main(recipe("model.compile=all"))
    losses = [[line["loss"] for line in records(run)[1:]] for run in (judge_run.folder, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["stats"]["unique_graphs"] > counted


def test_the_encoders_leave_the_device_once_all_is_kept(file_recipe, tmp_path):
    method, _ = built(file_recipe("parquet"))
    assert method.sets.cached
    assert method.diffusion.text_encoders == []
    assert {p.device.type for p in method.diffusion.vae.encoder.parameters()} == {"cpu"}
    live, _ = built(file_recipe("parquet", "data.cache=null"))
    assert not live.sets.cached
    assert len(live.diffusion.text_encoders) == 1


def test_broken_pairs_are_counted_named_and_left_out(file_recipe, tmp_path, capsys):
    arguments = file_recipe("jsonl", "data.max_broken=0.1")
    (tmp_path / "jsonl" / "images" / "9-1.jpg").write_bytes(b"not an image")
    arguments += ["optim.steps=4", "optim.batch=7", "optim.clean_share=0.5"]  # which see all pairs, half as they are
    main(arguments)
    named = (tmp_path / "run" / "broken.txt").read_text()
    assert named == "pairs.jsonl line 10: images/9-1.jpg is no image (JPEG, PNG, WEBP, BMP)\n"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["broken_pairs"] == {"count": 1, "such_as": [named.strip()]}
    assert summary["training_pairs"] + summary["heldout_pairs"] == 31
    assert f"1 broken pairs left out, named in {tmp_path / 'run' / 'broken.txt'}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["factory", "parquet"])
def test_a_resumed_run_goes_on_bit_for_bit(judge_run, recipe, file_recipe, tmp_path, form):
    straight, resumed = judge_run.folder, tmp_path / "resumed"
    arguments = recipe()
    if form == "parquet":
        straight = tmp_path / "run"
        arguments = file_recipe(form, "optim.steps=6", "optim.accumulate=2")
        main(arguments)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "000006")
    shutil.rmtree(resumed / "judge")
    main([*arguments, f"run.dir={resumed}", "run.resume=true"])
    assert same(judge_of(resumed), judge_of(straight))
    measured = ("iteration", "pairs", "optimizer_steps", "loss", "grad_norm", "accuracy", "heldout_accuracy")
    whole, parts = ([[line[name] for name in measured] for line in records(run)] for run in (straight, resumed))
    assert parts == whole
    assert whole[-1][:3] == [6, 48, 6]  # from files, a step is made of two batches of four
    summary = json.loads((resumed / "summary.json").read_text())
    assert summary["accuracy"]["before"] == records(straight)[0]["heldout_accuracy"]


@pytest.mark.slow
def test_two_processes_train_one_judge_share_a_cache_and_go_on_bit_for_bit(file_recipe, tmp_path, launch):
    def two_processes(arguments):
        with launch(train_judge.__file__, *arguments) as started:
            assert started.exit_code() == 0, started.said()[-3000:]

    arguments = file_recipe(
        "parquet", "optim.batch=1", "optim.accumulate=2", "data.labels=pickscore", "run.save_every=1"
    )
    two_processes(arguments)
    run = tmp_path / "run"
    whole = judge_of(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["pairs"], summary["optimizer_steps"]) == (12, 3)
    assert summary["optimizer_state_bytes_per_rank"] < 1.1 * 8 * summary["parameters"] / 2
    assert len(list((tmp_path / "cache" / "latents").rglob("*.entry"))) == 12
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002", "000003"]
    shutil.rmtree(run / "checkpoints" / "000003")
    shutil.rmtree(run / "judge")
    two_processes([*arguments, "run.resume=true"])
    assert same(judge_of(run), whole)


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl", "latent_tinyworld", "latent_sd15", "latent_sdxl"])
def test_the_recipes_are_valid(name):
    load(Path(__file__).parents[1] / "configs" / f"judge_{name}.yaml", cls=JudgeTrainingConfig)
