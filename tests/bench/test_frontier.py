"""bench/tinyworld/frontier.py: what is run, counted, compared and drawn; the runs themselves are made up here."""

import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from strop.bench.tinyworld import frontier, frontier_plot, runs
from strop.bench.tinyworld.frontier import COLUMNS, Costs
from strop.engine.config.find import load
from strop.engine.config.settings import differences, dump
from strop.engine.errors import UserError
from strop.engine.models.base_model import load_unet
from strop.engine.models.guided_unet import Savings
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.speed.apply import remove_idle_work


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(frontier.ROOT)


def made_up_run(out, name, seed, pairs=(7, 12), quality=0.3, rollout=8.0):
    """A finished run of two iterations in which so many pairs in all had been found after each."""
    run = frontier.folder(out, name, seed)
    run.mkdir(parents=True)
    config = frontier.recipe(name, f"run.seed={seed}", f"run.dir={run}")
    dump(config, run / "config.yaml")
    summary = {
        "quality": {"delta": quality},
        "alignment": {"delta": 0.01},
        "optimizer_steps": 5,
        "prompts": 2 * config.rollout.prompts,
        "seconds": {"rollout": rollout, "rollout/decode": 3.0, "update": 2.0, "evaluate": 50.0, "total": 60.0},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"iteration": i, "pairs": count}) for i, count in enumerate(pairs, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def columns(quality, flop=10.0, seconds=20.0):
    return dict(zip(COLUMNS, (quality, 0.01, 30, flop, seconds, 60.0), strict=True))


@pytest.fixture
def record():
    found = {
        "exact": {42: columns(0.3), 43: columns(0.4)},
        "control": {42: columns(0.2, flop=5.0), 43: columns(0.3, flop=5.0)},
        "recipe": {42: columns(0.3, flop=2.0, seconds=5.0), 43: columns(0.38, flop=3.0, seconds=7.0)},
    }
    return frontier.summarise(found)


def test_a_variant_changes_what_it_says():
    for name, variant in frontier.VARIANTS.items():
        changed = differences(load(variant.recipe), frontier.recipe(name))
        assert sorted(line.split(":")[0] for line in changed) == sorted(key.split("=")[0] for key in variant.changes)


def test_halving_the_pairs_halves_the_batch():
    exact = load(frontier.EXACT)
    for name in ("control", "num_steps", "judge_every", "keep_pairs"):
        assert frontier.recipe(name).optim.micro_batch == exact.optim.micro_batch // 2, name
    assert frontier.recipe("control").rollout.prompts == exact.rollout.prompts // 2
    for name in ("half", "passes"):
        assert frontier.recipe(name).run.iterations == exact.run.iterations // 2, name


def test_a_run_is_measured_without_its_evaluation(tmp_path):
    cost = {"flop": Costs(prompt=100, policy=3, reference=1), "seconds": Costs(prompt=0.5, policy=0.1, reference=0.05)}
    found = frontier.measure(made_up_run(tmp_path, "exact", 42), cost)
    assert found == {
        "quality": 0.3,
        "alignment": 0.01,
        "optimizer_steps": 5,
        "flop": 20 * 100 + 12 * (3 + 1),
        "seconds": pytest.approx(20 * 0.5 + 12 * (0.1 + 0.05)),
        "wall_seconds": 10.0,
    }
    half = frontier.measure(made_up_run(tmp_path, "keep_pairs", 42), cost)
    assert half["flop"] == 20 * 100 + (4 + 3) * (3 + 1)  # of 7 and 5 pairs, each half rounded up
    twice = frontier.measure(made_up_run(tmp_path, "passes", 42), cost)
    assert twice["flop"] == 20 * 100 + 12 * (2 * 3 + 1)


def test_figures_are_relative_to_the_exact_recipe_of_the_same_seed(record):
    found = record["variants"]["recipe"]
    assert found["seeds"][42]["relative"] == {"quality": 1.0, "flop": 0.2, "seconds": 0.25}
    assert found["seeds"][43]["relative"] == {"quality": 0.95, "flop": 0.3, "seconds": 0.35}
    assert found["mean"]["quality"] == 0.34
    assert found["mean"]["relative"] == {"quality": round(0.34 / 0.35, 4), "flop": 0.25, "seconds": 0.3}
    assert found["recipe"] == frontier.FAST
    assert record["machine"].startswith("cpu, ")
    assert "/" not in record["machine"]
    assert json.loads(json.dumps(record))["variants"]["exact"]["seeds"]["42"]["quality"] == 0.3


def test_fewer_seeds_are_compared_with_the_same_of_the_exact_recipe():
    found = {"exact": {42: columns(0.3), 43: columns(0.4)}, "half": {43: columns(0.2)}}
    assert frontier.summarise(found)["variants"]["half"]["mean"]["relative"]["quality"] == 0.5


def test_variants_of_an_earlier_record_stay(record, tmp_path):
    (tmp_path / "earlier.json").write_text(json.dumps({"variants": {"exact": "older", "latent": "kept"}}))
    found = frontier.with_earlier(record, tmp_path / "earlier.json")["variants"]
    assert found == record["variants"] | {"latent": "kept"}
    assert list(found) == [*record["variants"], "latent"]
    assert frontier.with_earlier(record, tmp_path / "none.json") == record


@pytest.mark.parametrize("exact", [{}, {"exact": {43: columns(0.3)}}], ids=["none", "another-seed"])
def test_nothing_is_compared_without_the_exact_recipe(exact):
    with pytest.raises(UserError, match=r"control.* exact"):
        frontier.summarise(exact | {"control": {42: columns(0.2)}})


def test_what_has_been_run_is_collected(tmp_path, monkeypatch):
    for name, seed in (("exact", 42), ("exact", 43), ("control", 43)):
        made_up_run(tmp_path, name, seed)
    costs_of = {"exact": Costs(prompt=100, policy=3, reference=1), "control": Costs(prompt=50, policy=3, reference=1)}
    monkeypatch.setattr(frontier, "costs", lambda name: {"flop": costs_of[name], "seconds": costs_of[name]})
    found = frontier.collect(tmp_path, range(42, 45))
    flops = {name: {seed: row["flop"] for seed, row in runs.items()} for name, runs in found.items()}
    assert flops == {"exact": {42: 2048, 43: 2048}, "control": {43: 10 * 50 + 48}}


def test_the_table_has_a_row_each_with_every_seed(record):
    rows = frontier.table(record).splitlines()
    assert rows[2] == "| exact | 30 | +0.350 (0.300 0.400) | 1.00 | +0.010 | 1.00 | 1.00 |"
    assert rows[4] == "| fast recipe | 30 | +0.340 (0.300 0.380) | 0.97 | +0.010 | 0.25 | 0.30 |"
    assert len(rows) == 5


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    made_up_run(tmp_path, "exact", 42)
    ran = []

    def run_one(name, seed, out):
        ran.append((name, seed))
        return frontier.folder(out, name, seed)

    monkeypatch.setattr(frontier, "run_one", run_one)
    frontier.run_all([("exact", 42), ("exact", 43), ("control", 42)], tmp_path, jobs=1)
    assert ran == [("exact", 43), ("control", 42)]
    assert capsys.readouterr().out.splitlines() == ["1/2 exact-43 | 0 min left", "2/2 control-42 | 0 min left"]


def test_a_run_of_another_recipe_is_refused(tmp_path):
    run = made_up_run(tmp_path, "exact", 42)
    assert frontier.finished(tmp_path, "exact", 42)
    dump(load(run / "config.yaml", ["optim.lr=0.1"]), run / "config.yaml")
    with pytest.raises(UserError, match=r"exact-42: .*optim.lr: 0.1 -> 0.0005"):
        frontier.finished(tmp_path, "exact", 42)


def test_a_run_is_the_engines_own_on_one_thread(tmp_path, monkeypatch):
    calls = []

    def run(command, env, stdout, stderr):
        calls.append((command[1:], env["OMP_NUM_THREADS"]))
        return SimpleNamespace(returncode=len(calls) - 1)

    monkeypatch.setattr(runs.subprocess, "run", run)
    left = frontier.folder(tmp_path, "control", 43)
    left.mkdir()
    (left / "config.yaml").write_text("of a run that was interrupted")
    assert frontier.run_one("control", 43, tmp_path) == left
    assert not left.exists()
    changes = ["rollout.prompts=5", "optim.micro_batch=20", "run.seed=43", f"run.dir={left}"]
    assert calls == [([str(frontier.ROOT / "engine" / "train.py"), "configs/tinyworld.yaml", *changes], "1")]
    with pytest.raises(UserError, match=r" 1; .*control-43.log"):
        frontier.run_one("control", 43, tmp_path)


def test_the_plot_is_drawn_and_calls_a_single_seed_one(record, tmp_path):
    frontier_plot.plot(record, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    several = record["variants"]["exact"]
    assert frontier_plot.titled(several) == "exact"
    assert "one" in frontier_plot.titled(several | {"seeds": {42: several["seeds"][42]}})


def test_labels_keep_clear_of_each_other_and_of_the_points():
    figure = Figure(figsize=(9, 6), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = {str(i): (0.5 + 0.001 * i, 0.5) for i in range(6)}
    canvas.draw()
    frontier_plot.label(axes, points, {name: f"a label of some length {name}" for name in points})
    canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points.values())


@pytest.mark.slow
def test_costs_are_those_of_the_networks_calls():
    """A prompt: 5 guided forwards of the trunk, 15 of 4 branches; 64 images decoded and judged. The text is kept."""
    model, cpu = frontier.recipe("exact").model, torch.device("cpu")
    policy = Policy(load_unet(model, cpu), 4, ("to_q",), seed=0, savings=Savings.of(model, 1))
    diffusion = LatentDiffusion.load(model, cpu)
    remove_idle_work(policy.unet, diffusion.vae, model.fold_upsample)
    x, t, cond = torch.zeros(1, *policy.latent_shape), torch.tensor([1]), diffusion.encode(["a"])
    with sdpa_kernel(SDPBackend.MATH), policy.reference():
        both, alone = (
            frontier.flop_of(lambda halves=halves: policy.eps(x, t, cond, halves))[1] for halves in (True, False)
        )
        decode = frontier.flop_of(lambda: diffusion.decode(x))[1]
    exact, text = frontier.costs("exact")["flop"], frontier.costs("look_ahead")["flop"]
    assert exact.reference == both
    assert exact.policy == pytest.approx(2 * exact.reference, rel=0.1)
    assert exact.prompt - text.prompt == pytest.approx(15 * (4 * both - 5 * alone), rel=0.1)
    assert exact.prompt > 65 * both + 64 * decode


def test_the_page_has_the_table_of_the_last_measurement():
    record = json.loads((frontier.ROOT / "bench" / "results" / "frontier_tinyworld.json").read_text())
    assert frontier.table(record) in (frontier.ROOT / "docs" / "cost.md").read_text(), (
        "make it anew of frontier_tinyworld.json"
    )
