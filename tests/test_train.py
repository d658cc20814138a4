"""The entry point end to end on the golden tiny model: what a run writes, that it repeats and resumes bit for bit."""

import json
import re
import shutil

import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file

from strop.engine import training
from strop.engine.config.find import load
from strop.engine.evaluation.monitor import Monitor
from strop.engine.methods.spo import columns, method
from strop.engine.models.lora_file import read
from strop.engine.report.run_folder import read_run
from strop.engine.report.verdict import verdict
from strop.engine.runtime import ledger, session
from strop.engine.runtime.columns import Column, Curve, Sign
from strop.engine.runtime.ledger import MEANS, Ledger
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.signs import ends_above
from strop.engine.train import main


def records(folder):
    """metrics.jsonl without what depends on the clock and the GPU."""
    clocks = ("seconds", "prompts_per_second", "eta_seconds", "gpu_hours", "energy_wh", *MEANS, "throttled")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_records(folder / "metrics.jsonl")]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def lora(folder):
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_writes_what_it_promises(training_run, recipe):
    run = training_run.folder
    for name in ("config.yaml", "before_after.png", "curves.png", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    summary = summary_of(run)
    assert summary["prompts"] == 4
    assert summary["pairs"] == 4 * 3  # threshold 0 keeps every pair: 3 judged steps
    assert summary["optimizer_steps"] == 2 * 2  # 6 pairs in micro-batches of 4
    assert summary["heldout_prompts"] == 3
    assert summary["words"] == {"base": 2.0, "tuned": 2.0, "delta": 0.0, "n": 3, "ci95": None, "p": None}
    for name in ("brightness", "judge"):
        assert summary[name]["delta"] == pytest.approx(summary[name]["tuned"] - summary[name]["base"])
        assert summary[name]["delta"] != 0
        assert summary[name]["ci95"] is None, "three prompts are too few"
    assert {"total", "load", "rollout", "update", "evaluate"} <= summary["seconds"].keys()
    last = records(run)[-1]
    assert last["iteration"] == 2
    assert last["kept"] == 1
    assert last["pairs_per_t"] == {"801": 0, "601": 0, "401": 2, "201": 2, "1": 2}
    path, *overrides = recipe(f"run.dir={run}")
    assert load(run / "config.yaml") == load(path, overrides)
    assert [words for words in ("brightness", str(run / "report.html")) if words not in training_run.printed] == []


def test_the_time_still_to_go_includes_the_closing_evaluation(training_run):
    """It is taken to last as long as the one before the loop; both together are the stage `evaluate`."""
    first, last = read_records(training_run.folder / "metrics.jsonl")
    assert 0 < last["eta_seconds"] < summary_of(training_run.folder)["seconds"]["evaluate"]
    assert first["eta_seconds"] > last["eta_seconds"]


def test_no_line_of_the_terminal_is_wider_than_80_columns(training_run, judge_run):
    for run in (training_run, judge_run):
        assert [line for line in run.printed.splitlines() if len(line) > 80 and "/" not in line] == []
        assert "\r" not in run.printed, "nothing moves where there is no terminal"


def test_the_last_lines_on_the_terminal_are_the_verdict(training_run, judge_run):
    for run in (training_run, judge_run):
        last = run.printed.rstrip().split("\n\n")[-1]
        assert " ".join(last.split()) == verdict(read_run(run.folder)).headline


def test_what_was_held_out_is_written_by_prompt(training_run):
    lines = [json.loads(line) for line in (training_run.folder / "heldout.jsonl").read_text().splitlines()]
    summary = summary_of(training_run.folder)
    assert [line["prompt"] for line in lines] == ["g", "h i", "j k l"]
    for name in ("brightness", "judge", "words"):
        for model in ("base", "tuned"):
            mean = sum(line["scores"][name][model] for line in lines) / 3
            assert summary[name][model] == pytest.approx(mean)


def test_on_a_cpu_there_is_no_ledger_and_nobody_is_told_of_one(training_run):
    run = training_run.folder
    summary = summary_of(run)
    assert summary["ledger"] == "not available"
    pace = summary["prompts"] / (summary["seconds"]["rollout"] + summary["seconds"]["update"])
    assert summary["prompts_per_second"] == pytest.approx(pace)
    assert not re.search("the GPU|not available", training_run.printed + (run / "report.html").read_text())
    line = read_records(run / "metrics.jsonl")[-1]
    assert {line[name] for name in ("gpu_hours", "energy_wh", *MEANS, "throttled")} == {None}


def test_a_ledger_goes_on_over_a_resumption_and_changes_no_bit(
    training_run, recipe, tmp_path, nvml, monkeypatch, capsys
):
    nvml.answers |= {"CurrentClocksEventReasons": [4], "TotalEnergyConsumption": [7_000_000, 7_700_000]}
    monkeypatch.setattr(ledger, "EVERY", 0.01)
    monkeypatch.setattr(training, "seconds_at_peak", lambda *_: {"prompts": 0.002, "pairs": 0.001})
    monkeypatch.setattr(session, "Ledger", lambda device: Ledger(torch.device("cuda", 0)))
    main(recipe("run.iterations=1"))
    half = summary_of(tmp_path / "run")["ledger"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "000001" / "state.json").read_text())["ledger"]
    nvml.asked.clear()  # the counter of another day
    nvml.answers["TotalEnergyConsumption"] = [1_000_000, 1_070_000]
    main(recipe("run.resume=true"))
    assert_same_tensors(lora(tmp_path / "run"), lora(training_run.folder))
    assert records(tmp_path / "run") == records(training_run.folder)
    whole = summary_of(tmp_path / "run")["ledger"]
    assert whole["energy_kwh"] == pytest.approx((state["joules"][1] + 70) / 3.6e6)
    assert whole["gpu_hours"] > state["seconds"][1] / 3600 > 0
    assert half["energy_kwh"] == pytest.approx(700 / 3.6e6)
    first, second = read_records(tmp_path / "run" / "metrics.jsonl")
    assert second["gpu_hours"] > first["gpu_hours"] > 0
    assert (first["energy_wh"], second["energy_wh"]) == pytest.approx((700 / 3600, 770 / 3600))
    at_work = [line["seconds"]["rollout"] + line["seconds"]["update"] for line in (first, second)]
    at_peak = 2 * 0.002 + 6 * 0.001  # two prompts, six pairs
    assert [first["share_of_peak"], second["share_of_peak"]] == pytest.approx([at_peak / s for s in at_work])
    assert whole["share_of_peak"] == pytest.approx(2 * at_peak / sum(at_work))
    shown = (tmp_path / "run" / "report.html").read_text()
    assert "100.0% of the time by power cap" in shown
    assert "not available" not in shown + capsys.readouterr().out


def test_a_new_metric_is_one_column_and_one_value(recipe, tmp_path, monkeypatch, capsys):
    surprise = Column(
        "surprise",
        heading="surprise",
        form="{:.2f}",
        drawn=Curve("Surprise", "healthy: small"),
        signs=(Sign(ends_above(1), "Surprise is {:.1f} at the end."),),
    )
    described, loss, titles = (*columns.COLUMNS, surprise), method.SPO.loss, []

    def measured(self, batch):
        value, stats = loss(self, batch)
        return value, stats | {"surprise": torch.tensor(1.5)}

    monkeypatch.setattr(method.SPO, "columns", described)
    monkeypatch.setattr(method.SPO, "loss", measured)
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    main(recipe("run.iterations=1"))
    run = tmp_path / "run"
    assert records(run)[-1]["surprise"] == 1.5
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(at for at, words in enumerate(shown) if words[:1] == ["iteration"])
    assert (shown[header][-1], shown[header + 1][-1]) == ("surprise", "1.50")
    assert "Surprise" in titles
    assert '<li class="bad">Surprise is 1.5 at the end.</li>' in (run / "report.html").read_text()


def test_another_seed_gives_other_bits(training_run, recipe, tmp_path):
    """That the same one gives the same, also over a resumption, the tests of the ledger and of checkpoints say."""
    main(recipe("run.iterations=1", "run.seed=2"))
    assert records(training_run.folder)[0]["judge"] != records(tmp_path / "run")[0]["judge"]


def test_a_resumed_run_goes_on_bit_for_bit(recipe, tmp_path):
    """With micro-batches waiting for an optimizer step, and with a second pass in an order of its own."""
    common = ("optim.accumulate=3", "optim.passes=2", "optim.keep_pairs=0.7", "rollout.look_ahead=text")
    common += ("evaluate.every=1",)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    main(recipe(f"run.dir={straight}", *common))
    main(recipe(f"run.dir={halves}", "run.iterations=1", *common))
    first = summary_of(halves)
    main(recipe(f"run.dir={halves}", "run.resume=true", *common))
    assert_same_tensors(lora(straight), lora(halves))
    assert records(straight) == records(halves)
    assert set(records(straight)[1]["heldout"]) == {"brightness", "words", "judge"}
    summary = summary_of(halves)
    assert summary["prompts"] == 4
    assert summary["optimizer_steps"] == summary_of(straight)["optimizer_steps"]
    assert summary["seconds"]["total"] > first["seconds"]["total"] - first["seconds"]["evaluate"]


def test_a_run_that_goes_wrong_ends_with_the_lora_of_its_best_evaluation(recipe, tmp_path, monkeypatch):
    reasons = iter(("", "colours fell", "colours fell"))
    monkeypatch.setattr(Monitor, "_reasons", lambda self, tuned, moved: next(reasons))
    main(
        recipe("run.iterations=9", "run.save_every=9", "evaluate.every=1", "evaluate.patience=2", "evaluate.stop=true")
    )
    run = tmp_path / "run"
    summary = summary_of(run)
    assert (summary["iterations"], summary["lora_iteration"], summary["prompts"]) == (3, 1, 6)
    weights = lambda folder: load_file(run / folder / "pytorch_lora_weights.safetensors")
    assert_same_tensors(weights("lora"), weights("checkpoints/000001"))
    assert_same_tensors(weights("lora_last"), weights("checkpoints/000003"))
    assert read(run / "lora" / "run_kohya.safetensors").facts["strop.iteration"] == "1"
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["000001.png", "000002.png", "000003.png"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_trains_a_lora_in_float32(recipe, tmp_path, dtype):
    main(recipe("run.iterations=1", f"model.dtype={dtype}"))
    trained = lora(tmp_path / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    assert all(value.any() for name, value in trained.items() if ".up." in name), "B starts at 0 and has moved"


def test_without_a_file_of_their_own_held_out_prompts_are_not_trained_on(recipe, tmp_path, capsys):
    """And which they are is not changed when a run goes on."""
    (tmp_path / "train.txt").write_text("a b c\nd e\nf\ng\nh\n")
    split = (f"prompts.train={tmp_path / 'train.txt'}", "prompts.heldout=null")
    main(recipe("run.iterations=1", *split, "evaluate.prompts=2"))
    assert summary_of(tmp_path / "run")["heldout_prompts"] == 2
    with pytest.raises(SystemExit):
        main(recipe(*split, "run.resume=true", "evaluate.prompts=3"))
    assert "evaluate.prompts: 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "family, overrides, judged",
    [
        ("sd15", "rollout.inner_steps=2 rollout.merge_last=true optim.passes=2 optim.keep_pairs=0.5", [401, 201, 1]),
        ("sd15", "rollout.t_range=[300,700] rollout.eta=0.5 optim.clip=null optim.max_grad_norm=null", [601, 401]),
        ("sd15", "rollout.guidance=1 rollout.num_steps=7", [285, 143, 1]),
        ("sdxl", "rollout.guidance=1 rollout.next_state=winner rollout.pair=random rollout.k=3", [401, 201, 1]),
        ("sdxl", "rollout.look_ahead=text rollout.inner_steps=2 optim.passes=2", [401, 201, 1]),
        ("sdxl", "rollout.judge_every=2 optim.guided=false", [401, 1]),
    ],
)
def test_every_ablation_trains(recipe, tmp_path, tiny_sdxl_folder, family, overrides, judged):
    model = () if family == "sd15" else (f"model.path={tiny_sdxl_folder}",)
    main(recipe("run.iterations=1", *model, *overrides.split()))
    last = records(tmp_path / "run")[-1]
    assert {int(t): count for t, count in last["pairs_per_t"].items() if count} == dict.fromkeys(judged, 2)
    assert (last["kept"], last["pairs"]) == (1, 2 * len(judged))
    assert any(value.any() for name, value in lora(tmp_path / "run").items() if ".up." in name), "B has moved"


def test_a_tiny_decoder_shows_the_judge_its_images_and_nobody_else(training_run, recipe, tmp_path, tiny_decoder_folder):
    main(recipe("run.iterations=1", f"rollout.decoder={tiny_decoder_folder}"))
    vae, tiny = (summary_of(run) for run in (training_run.folder, tmp_path / "run"))
    for score in ("judge", "brightness"):
        assert vae[score]["base"] == tiny[score]["base"]
    assert records(training_run.folder)[0]["judge"] != records(tmp_path / "run")[0]["judge"]


def test_both_lora_files_and_the_checkpoint_hold_what_was_trained_and_no_frozen_base(training_run):
    run = training_run.folder
    diffusers = read(run / "lora" / "pytorch_lora_weights.safetensors")
    kohya = read(run / "lora" / "run_kohya.safetensors")
    assert_same_tensors(diffusers.state(), kohya.state())
    assert (kohya.facts["strop.iteration"], kohya.facts["ss_base_model_version"]) == ("2", "sd_v1")
    first, second = (run / "checkpoints" / f"00000{i}" / "pytorch_lora_weights.safetensors" for i in (1, 2))
    assert read(first).facts["strop.iteration"] == "1"
    assert_same_tensors(lora(run), load_file(second))
    trained = sum(value.nbytes for value in lora(run).values())
    assert sum(file.stat().st_size for file in second.parent.iterdir()) < 3 * trained + 100_000


def test_an_unfinished_checkpoint_does_not_count(training_run, recipe, tmp_path):
    """And a run goes on bit for bit from the one before it."""
    shutil.copytree(training_run.folder, tmp_path / "run")
    unfinished = tmp_path / "run" / "checkpoints" / "000002"
    unfinished.rename(unfinished.with_name(".000002.draft"))
    main(recipe("run.resume=true"))
    assert records(tmp_path / "run") == records(training_run.folder)
    assert_same_tensors(lora(tmp_path / "run"), lora(training_run.folder))


@pytest.mark.parametrize("override, forced", [((), False), (("run.kernels=reference",), True)], ids=str)
def test_the_recipe_decides_whether_the_kernels_may_run(recipe, override, forced, monkeypatch):
    """Before anything is loaded, and for the whole run."""

    def ask(value):
        raise LookupError(value)

    monkeypatch.setattr("strop.engine.runtime.session.use_reference", ask)
    with pytest.raises(LookupError, match=str(forced)):
        main(recipe(*override))
