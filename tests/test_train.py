"""The entry point end to end on the golden tiny model: what a run writes, that it repeats and resumes bit for bit."""

import json
import shutil

import pytest
import torch
import yaml
from matplotlib.axes import Axes
from safetensors.torch import load_file

from strop.engine import training
from strop.engine.config.training import ModelConfig, OptimConfig, load
from strop.engine.methods.spo import columns, method
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.models.base_model import load_unet
from strop.engine.models.lora_file import read
from strop.engine.models.policy import Policy
from strop.engine.runtime import ledger, session
from strop.engine.runtime.columns import Column, Curve, Sign
from strop.engine.runtime.ledger import MEANS, Ledger
from strop.engine.runtime.metrics import read_records
from strop.engine.train import main

SECTIONS = {
    "rollout": {"prompts": 2, "k": 2, "num_steps": 5, "t_range": [0, 401], "threshold": 0.0},
    "optim": {"lr": 1e-2, "micro_batch": 4},
    "evaluate": {"prompts": 3, "num_steps": 2, "batch": 2, "pictures": 2, "examiner": "tests_examiner:load"},
    "run": {"iterations": 2, "save_every": 1, "device": "cpu"},
}

EXAMINER = """
def load(device):
    def examine(images, prompts):
        words = images.new_tensor([len(prompt.split()) for prompt in prompts])
        return {"brightness": images.mean((1, 2, 3)), "words": words}
    return examine
"""


@pytest.fixture
def recipe(tmp_path, tiny_folder, clip_folder, monkeypatch):
    """recipe("run.iterations=1", ...) -> the command line of a run in tmp_path/run."""
    (tmp_path / "tests_examiner.py").write_text(EXAMINER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "train.txt").write_text("a b c\nd e\n\nf\n")
    (tmp_path / "heldout.txt").write_text("g\nh i\nj k l\n")
    tree = SECTIONS | {
        "model": {"path": str(tiny_folder)},
        "judge": {"path": str(clip_folder), "kind": "pickscore"},
        "prompts": {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "heldout.txt")},
        "run": SECTIONS["run"] | {"dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return lambda *overrides: [str(path), *overrides]


def records(folder):
    """metrics.jsonl without what depends on the clock and the GPU."""
    clocks = ("seconds", "prompts_per_second", "eta_seconds", "gpu_hours", "energy_wh", *MEANS, "throttled")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_records(folder / "metrics.jsonl")]


def lora(folder):
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_writes_what_it_promises(recipe, tmp_path, capsys):
    main(recipe())
    run = tmp_path / "run"
    for name in (
        "config.yaml",
        "before_after.png",
        "curves.png",
        "report.html",
        "lora/pytorch_lora_weights.safetensors",
        "lora/run_kohya.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["prompts"] == 4
    assert summary["pairs"] == 4 * 3  # threshold 0 keeps every pair: 3 judged steps
    assert summary["optimizer_steps"] == 2 * 2  # 6 pairs in micro-batches of 4
    assert summary["heldout_prompts"] == 3
    assert summary["words"] == {"base": 2.0, "tuned": 2.0, "delta": 0.0, "ci95": [0.0, 0.0]}
    for name in ("brightness", "judge"):
        assert summary[name]["delta"] == pytest.approx(summary[name]["tuned"] - summary[name]["base"])
        assert summary[name]["delta"] != 0
        assert len(summary[name]["ci95"]) == 2
    assert {"total", "load", "rollout", "update", "evaluate"} <= summary["seconds"].keys()
    last = records(run)[-1]
    assert last["iteration"] == 2
    assert last["kept"] == 1
    assert last["pairs_per_t"] == {"801": 0, "601": 0, "401": 2, "201": 2, "1": 2}
    assert load(run / "config.yaml") == load(recipe()[0])
    printed = capsys.readouterr().out
    assert "brightness" in printed
    assert str(run / "report.html") in printed


MISSING = "GPU-hours, energy, share of peak, utilisation, SM clock, memory clock, throttled"


def test_on_a_cpu_the_ledger_is_not_available_and_says_so_once(recipe, tmp_path, capsys):
    main(recipe("run.iterations=1"))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ledger"] == "not available"
    pace = summary["prompts"] / (summary["seconds"]["rollout"] + summary["seconds"]["update"])
    assert summary["prompts_per_second"] == pytest.approx(pace)
    printed = capsys.readouterr().out
    assert f"not available   {MISSING}" in printed
    assert printed.count("not available") == 1
    assert f"<dt>not available</dt><dd>{MISSING}</dd>" in (run / "report.html").read_text()
    (line,) = read_records(run / "metrics.jsonl")
    assert {line[name] for name in ("gpu_hours", "energy_wh", *MEANS, "throttled")} == {None}


def test_a_ledger_goes_on_over_a_resumption_and_changes_no_bit(recipe, tmp_path, nvml, monkeypatch, capsys):
    main(recipe(f"run.dir={tmp_path / 'without'}"))
    capsys.readouterr()
    nvml.answers |= {"CurrentClocksEventReasons": [4], "TotalEnergyConsumption": [7_000_000, 7_700_000]}
    monkeypatch.setattr(ledger, "EVERY", 0.01)
    monkeypatch.setattr(training, "seconds_at_peak", lambda *_: {"prompts": 0.002, "pairs": 0.001})
    monkeypatch.setattr(session, "Ledger", lambda device: Ledger(torch.device("cuda", 0)))
    main(recipe("run.iterations=1"))
    half = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "000001" / "state.json").read_text())["ledger"]
    nvml.asked.clear()  # the counter of another day
    nvml.answers["TotalEnergyConsumption"] = [1_000_000, 1_070_000]
    main(recipe("run.resume=true"))
    assert_same_tensors(lora(tmp_path / "run"), lora(tmp_path / "without"))
    assert records(tmp_path / "run") == records(tmp_path / "without")
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]
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
    assert "<dt>throttled</dt><dd>100.0% of the time by power cap</dd>" in shown
    assert "not available" not in shown + capsys.readouterr().out


def test_a_new_metric_is_one_column_and_one_value(recipe, tmp_path, monkeypatch, capsys):
    surprise = Column(
        "surprise",
        heading="surprise",
        form="{:.2f}",
        drawn=Curve("Surprise", "healthy: small"),
        signs=(Sign(lambda value: value > 1, "Surprise is {:.1f} at the end."),),
    )
    described, loss, titles = (*columns.COLUMNS, surprise), method.SPO.loss, []

    def measured(self, batch):
        value, stats = loss(self, batch)
        return value, stats | {"surprise": torch.tensor(1.5)}

    for module in (columns, method):
        monkeypatch.setattr(module, "COLUMNS", described)
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


def test_same_seed_same_bits_other_seed_other_bits(recipe, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        main(recipe(f"run.dir={tmp_path / name}", f"run.seed={seed}"))
    assert_same_tensors(lora(tmp_path / "one"), lora(tmp_path / "again"))
    assert records(tmp_path / "one") == records(tmp_path / "again")
    assert records(tmp_path / "one") != records(tmp_path / "other")


@pytest.mark.parametrize(
    "common",
    [
        ("optim.accumulate=1",),
        ("optim.accumulate=3",),
        ("optim.passes=2", "optim.keep_pairs=0.7", "rollout.look_ahead=text"),
    ],
    ids=["whole-steps", "micro-batches-waiting", "approximations"],
)
def test_a_resumed_run_goes_on_bit_for_bit(recipe, tmp_path, common):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    main(recipe(f"run.dir={straight}", "run.iterations=3", *common))
    main(recipe(f"run.dir={halves}", "run.iterations=1", *common))
    first = json.loads((halves / "summary.json").read_text())
    main(recipe(f"run.dir={halves}", "run.iterations=3", "run.resume=true", *common))
    assert_same_tensors(lora(straight), lora(halves))
    assert records(straight) == records(halves)
    summary = json.loads((halves / "summary.json").read_text())
    assert summary["prompts"] == 6
    assert summary["optimizer_steps"] == json.loads((straight / "summary.json").read_text())["optimizer_steps"]
    assert summary["seconds"]["total"] > first["seconds"]["total"] - first["seconds"]["evaluate"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_base_trains_a_lora_in_float32(recipe, tmp_path, dtype):
    main(recipe("run.iterations=1", f"model.dtype={dtype}"))
    trained = lora(tmp_path / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    assert all(value.any() for name, value in trained.items() if ".up." in name), "B starts at 0 and has moved"


def test_checkpoints_do_not_hold_the_frozen_base(recipe, tmp_path):
    main(recipe("run.iterations=1"))
    checkpoint = tmp_path / "run" / "checkpoints" / "000001"
    trained = sum(value.nbytes for value in lora(tmp_path / "run").values())
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3 * trained + 100_000
    assert_same_tensors(lora(tmp_path / "run"), load_file(checkpoint / "pytorch_lora_weights.safetensors"))


def refused(arguments, capsys):
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("strop: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.inner_step=3", "unknown key rollout.inner_step; did you mean rollout.inner_steps?"),
        ("rollout.k=four", "rollout.k: found 'four', expected a valid integer"),
        ("optim.clip=1.5", "optim.clip: found 1.5, expected less than 1"),
        ("model.path=nowhere", "model.path: no such file or folder nowhere"),
        ("judge.path=nowhere", "judge.path: no such file or folder nowhere"),
        ("prompts.train=nowhere.txt", "prompts.train: nowhere.txt cannot be read (No such file or directory)"),
        ("evaluate.prompts=4", "evaluate.prompts: found 4, expected 1 (the processes) to 3"),
        ("evaluate.examiner=nowhere:load", "evaluate.examiner: no module nowhere"),
        ("lora.target_modules=[to_x]", "lora.target_modules: found ['to_x']"),
        ("rollout.judge_every=4", "rollout.judge_every: found 4, expected at most 3, the number of segments in"),
        ("rollout.decoder=nowhere", "rollout.decoder: no such file or folder nowhere"),
        ("run.resume=true", "holds no checkpoint"),
        ("nonsense", "expected section.key=value"),
    ],
    ids=lambda value: value.split("=")[0] if "=" in value else None,
)
def test_bad_input_gets_one_sentence_and_leaves_no_run_folder(recipe, tmp_path, capsys, override, sentence):
    assert sentence in refused(recipe(override), capsys)
    assert not (tmp_path / "run").exists()


def test_empty_prompts_file(recipe, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("\n \n")
    assert f"prompts.train: {tmp_path / 'train.txt'} holds no prompt" in refused(recipe(), capsys)


def test_training_prompts_among_the_heldout(recipe, tmp_path, capsys):
    (tmp_path / "heldout.txt").write_text("g\nd e\nj\n")
    assert "prompts.heldout: 1 prompts are training prompts too, such as 'd e'" in refused(recipe(), capsys)


def test_unwritable_run_folder(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be" in refused(recipe(f"run.dir={tmp_path / 'file' / 'run'}"), capsys)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_holds_a_run_is_left_alone(recipe, tmp_path, capsys):
    main(recipe("run.iterations=1"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "is not empty; choose a new folder, or run.resume=true" in refused(recipe(), capsys)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_resume_from_another_configuration(recipe, tmp_path, capsys):
    main(recipe("run.iterations=1"))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    error = refused(recipe("run.resume=true", "optim.beta=5", "rollout.k=3"), capsys)
    assert "belongs to another configuration (rollout.k: 2 -> 3; optim.beta: 10.0 -> 5.0)" in error
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_without_a_file_of_their_own_held_out_prompts_are_not_trained_on(recipe, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("a b c\nd e\nf\ng\nh\n")
    main(recipe("run.iterations=1", "prompts.heldout=null", "evaluate.prompts=2"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_prompts"] == 2
    capsys.readouterr()
    again = ("run.resume=true", "run.iterations=2", "prompts.heldout=null")
    assert "evaluate.prompts: 2 -> 3" in refused(recipe(*again, "evaluate.prompts=3"), capsys)
    too_many = refused(recipe("run.dir=other", "prompts.heldout=null", "evaluate.prompts=5"), capsys)
    assert "evaluate.prompts: found 5, expected 1 (the processes) to 4 (held out of the prompts in" in too_many


@pytest.mark.parametrize(
    "overrides",
    [
        ("rollout.inner_steps=2",),
        ("rollout.inner_steps=2", "rollout.merge_last=true"),
        ("rollout.next_state=winner", "rollout.pair=random", "rollout.k=3"),
        ("rollout.t_range=[300, 700]", "rollout.eta=0.5"),
        ("optim.guided=false", "optim.clip=null", "optim.max_grad_norm=null"),
        ("rollout.guidance=1", "rollout.num_steps=7"),
        ("rollout.look_ahead=text", "optim.passes=2", "optim.keep_pairs=0.5"),
        ("rollout.look_ahead=text", "rollout.inner_steps=2", "optim.passes=2"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_ablation_trains_both_families(recipe, tmp_path, tiny_sdxl_folder, family, overrides):
    model = () if family == "sd15" else (f"model.path={tiny_sdxl_folder}",)
    main(recipe("run.iterations=1", *model, *overrides))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    low, high = load(recipe()[0], overrides).rollout.t_range
    last = records(tmp_path / "run")[-1]
    assert {int(t) for t, kept in last["pairs_per_t"].items() if kept} == {
        t for t in map(int, last["pairs_per_t"]) if low <= t <= high
    }
    assert summary["pairs"] == sum(last["pairs_per_t"].values())
    assert any(value.any() for name, value in lora(tmp_path / "run").items() if ".up." in name), "B has moved"


def test_passes_and_the_share_of_the_pairs_set_the_number_of_optimizer_steps(recipe, tmp_path):
    """Each iteration keeps 6 pairs: 2 prompts at 3 judged steps."""
    given = ("run.iterations=1", "optim.micro_batch=2")
    for name, overrides, steps in (
        ("exact", (), 3),
        ("passes", ("optim.passes=3",), 9),
        ("share", ("optim.keep_pairs=0.5",), 2),  # 3 pairs, the last micro-batch with one
        ("both", ("optim.passes=2", "optim.keep_pairs=0.2"), 2),
    ):
        main(recipe(f"run.dir={tmp_path / name}", *given, *overrides))
        assert json.loads((tmp_path / name / "summary.json").read_text())["optimizer_steps"] == steps, name


def test_only_every_other_step_is_judged_and_trained(recipe, tmp_path):
    main(recipe("run.iterations=1", "rollout.judge_every=2"))
    last = records(tmp_path / "run")[-1]
    assert last["pairs_per_t"] == {"801": 0, "601": 0, "401": 2, "201": 0, "1": 2}
    assert last["kept"] == 1


def test_a_tiny_decoder_shows_the_judge_its_images_and_nobody_else(recipe, tmp_path, tiny_decoder_folder):
    for name, overrides in (("vae", ()), ("tiny", (f"rollout.decoder={tiny_decoder_folder}",))):
        main(recipe(f"run.dir={tmp_path / name}", "run.iterations=1", *overrides))
    vae, tiny = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("vae", "tiny"))
    for score in ("judge", "brightness"):
        assert vae[score]["base"] == tiny[score]["base"]
    assert records(tmp_path / "vae")[-1]["judge"] != records(tmp_path / "tiny")[-1]["judge"]


def test_resume_with_another_rank(recipe, tmp_path, capsys):
    main(recipe("run.iterations=1"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "another configuration (lora.rank: 4 -> 8)" in refused(recipe("run.resume=true", "lora.rank=8"), capsys)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_resume_with_a_lora_put_in_the_place_of_the_runs_own(recipe, tmp_path, tiny_folder, capsys):
    """Refused before anything is computed or written."""
    main(recipe("run.iterations=1"))
    unet = load_unet(ModelConfig(path=str(tiny_folder)), torch.device("cpu"))
    other = Policy(unet, 2, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    file = other.save_lora(tmp_path / "run" / "checkpoints" / "000001")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    error = refused(recipe("run.iterations=2", "run.resume=true"), capsys)
    assert f"{file} has rank 2, expected rank 4 (lora.rank)" in error
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_both_lora_files_hold_what_was_trained(recipe, tmp_path):
    main(recipe())
    diffusers = read(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    kohya = read(tmp_path / "run" / "lora" / "run_kohya.safetensors")
    assert_same_tensors(diffusers.state(), kohya.state())
    assert kohya.facts["strop.iteration"] == "2"
    assert kohya.facts["ss_base_model_version"] == "sd_v1"
    checkpoint = read(tmp_path / "run" / "checkpoints" / "000001" / "pytorch_lora_weights.safetensors")
    assert checkpoint.facts["strop.iteration"] == "1"


def test_an_unfinished_checkpoint_does_not_count(recipe, tmp_path):
    main(recipe("run.iterations=1"))
    kept = tmp_path / "run" / "checkpoints" / "000001"
    shutil.copytree(kept, kept.with_name(".000002.draft"))
    main(recipe("run.iterations=2", "run.resume=true"))
    assert [line["iteration"] for line in records(tmp_path / "run")] == [1, 2]


@pytest.fixture
def batch(diffusion):
    """Six pairs of two prompts that share x_t, and their conditioning."""
    rng = torch.Generator().manual_seed(5)
    pairs = PreferencePairs(
        x_t=torch.randn(1, 6, 4, 8, 8, generator=rng),
        x_prev=torch.randn(2, 6, 4, 8, 8, generator=rng),
        step=torch.tensor([4, 5, 6, 7, 8, 9]),
        prompt=torch.tensor([0, 1, 0, 1, 0, 1]),
        shared=torch.ones(6, dtype=bool),
    )
    return pairs, diffusion.encode(["a b", "c"])


def updated(policy, diffusion, batch):
    """Gradients and stats of one micro-batch, of which two make an optimizer step."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters:  # away from the reference, so that the gradients say something
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    loss, stats = Learner(policy, diffusion.schedule(20, 1.0, 5.0), OptimConfig()).loss(batch)
    (loss / 2).backward()
    return [p.grad.clone() for p in policy.parameters], stats


def test_sharing_one_forward_changes_nothing(policy, tiny_folder, diffusion, batch):
    pairs, cond = batch
    shared, one = updated(policy, diffusion, MicroBatch(pairs, len(pairs), cond))
    other = Policy(
        load_unet(ModelConfig(path=str(tiny_folder)), torch.device("cpu")),
        4,
        ("to_q", "to_k", "to_v", "to_out.0"),
        seed=0,
    )
    apart, two = updated(other, diffusion, MicroBatch(pairs.apart(), 0, cond))
    assert one["loss"].item() == pytest.approx(two["loss"].item(), rel=1e-5)
    assert one["margin"].item() == pytest.approx(two["margin"].item(), abs=2e-5)  # a difference of large numbers
    for a, b in zip(shared, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    "override, forced", [((), False), (("run.kernels=reference",), True)], ids=["auto", "reference"]
)
def test_the_recipe_decides_whether_the_kernels_may_run(recipe, override, forced, monkeypatch):
    """Before anything is loaded, and for the whole run."""

    class Asked(Exception):
        pass

    def ask(value):
        raise Asked(value)

    monkeypatch.setattr("strop.engine.runtime.session.use_reference", ask)
    with pytest.raises(Asked, match=str(forced)):
        main(recipe(*override))
