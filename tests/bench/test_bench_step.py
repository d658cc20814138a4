"""strop.bench.bench_step on tiny networks: what it counts, what it divides, and where it takes random weights."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from strop.bench import bench_step, ours, published
from strop.bench.bench_step import measure, recipes, summary, table
from strop.bench.machine import RESULTS
from strop.bench.sides import Side, build, ratios
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import varied
from strop.engine.errors import UserError
from strop.engine.models.families import find

CPU = torch.device("cpu")
STAGES = {"text", "rollout/trunk", "rollout/branches", "rollout/decode", "rollout/judge", "update", "update/optimizer"}


@pytest.fixture
def recipe(tiny_folder, clip_folder, tmp_path):
    """recipe(rollout={...}, ...) -> a SPOConfig of the tiny SD-1.5, three prompts, all pairs kept."""
    (tmp_path / "prompts.txt").write_text("a b c\nd\ne f\n")

    def make(path=tiny_folder, rollout=(), optim=(), iterations=8):
        common = {"prompts": 3, "k": 3, "num_steps": 5, "t_range": (0, 601), "threshold": 0.0}
        return SPOConfig.model_validate(
            {
                "model": {"path": str(path)},
                "judge": {"path": str(clip_folder), "kind": "pickscore"},
                "prompts": {"train": str(tmp_path / "prompts.txt")},
                "rollout": common | dict(rollout),
                "optim": {"micro_batch": 4} | dict(optim),
                "run": {"dir": str(tmp_path), "iterations": iterations},
            }
        )

    return make


def test_a_record_of_all_sides(recipe, capsys):
    fast = recipe(rollout={"look_ahead": "text"}, optim={"passes": 2}, iterations=2)
    latent = varied(recipe(), {"judge.kind": "latent", "judge.path": "none"})
    first, *_, record = json.loads(json.dumps([*measure(recipe(), {"fast": fast, "latent": latent}, 2, CPU)]))
    assert list(first["sides"]) == ["published", "exact"]  # the record is there before all is measured
    assert first["faster_per_prompt"] == {"exact": record["thresholds"]["0"]["rounds"]["exact"][0]}
    sides = record["sides"]
    assert [(name, side["pairs"]) for name, side in sides.items()] == [
        (name, 12)
        for name in ("published", "exact", "fast", "latent")  # 3 prompts at 4 steps
    ]
    assert sides["latent"]["tflop"]["rollout/decode"] == sides["latent"]["seconds"]["rollout/decode"] == 0
    assert sides["latent"]["tflop"]["rollout/judge"] > 0
    for side in sides.values():
        assert set(side["seconds"]) == {*STAGES, "total"}
        parts = sum(seconds for stage, seconds in side["seconds"].items() if stage not in ("update/optimizer", "total"))
        assert 0.9 * side["seconds"]["total"] < parts <= side["seconds"]["total"]
        assert side["seconds_per_prompt"] == pytest.approx(side["seconds"]["total"] / 3)
        whole = sum(v for k, v in side["tflop"].items() if k not in ("total", "update/optimizer"))
        assert side["tflop"]["total"] == pytest.approx(whole, rel=0.02)  # keys and values of the text are in no stage
        assert side["share_of_matmul"]["update"] > 0
        assert side["peak_bytes"] is None
    shown = sides["exact"]["profile"]["longest"]
    assert "aten::mkldnn_convolution" in [row["name"] for row in shown]
    assert 0 < sum(row["seconds"] for row in shown) <= sides["exact"]["profile"]["seconds"]
    spent = lambda stage: [sides[name]["tflop"][stage] for name in ("published", "exact", "fast")]
    assert spent("text")[0] > spent("text")[1] == spent("text")[2]
    assert spent("update")[0] > 1.9 * spent("update")[1]  # winner and loser in one forward
    assert spent("update")[2] == pytest.approx(spent("update")[1] * 5 / 3, rel=0.1)  # forward and backward once more
    assert spent("rollout/branches")[0] > spent("rollout/branches")[1] > 1.5 * spent("rollout/branches")[2]
    assert spent("rollout/decode")[0] > spent("rollout/decode")[1] == spent("rollout/decode")[2]
    per_prompt, per_run = record["faster_per_prompt"], record["faster_per_run"]
    assert per_run["exact"] == pytest.approx(per_prompt["exact"])
    assert per_run["fast"] == pytest.approx(4 * per_prompt["fast"])  # two iterations in place of eight
    assert "round 2 of 2" in capsys.readouterr().out


def test_thresholds_leave_out_pairs_and_the_ratios_beside_them(recipe):
    """All pairs, those that the golden judge finds different enough, and none: 3 prompts at 4 steps."""
    *_, record = json.loads(json.dumps([*measure(recipe(), {}, 2, CPU, (0, 0.02, 0.9), profiled=False)]))
    assert list(record["thresholds"]) == ["0", "0.02", "0.9"]
    at = record["thresholds"].values()
    for side in ("published", "exact"):
        assert [each["kept"][side] for each in at][::2] == [1, 0]
        assert 0 < record["thresholds"]["0.02"]["kept"][side] < 1
    assert all(len(each["rounds"]["exact"]) == 2 for each in at)
    assert record["thresholds"]["0"]["faster_per_prompt"] == record["faster_per_prompt"]
    lines = table({"recipe": "tiny", **record}).splitlines()
    assert lines[-1] == "| pairs kept at 0.9 | 0% | 0% |"
    assert re.fullmatch(r"\| faster per prompt at 0\.9 \| 1 \| \d\.\d\dx \(±\d+%\) \|", lines[-2])


def test_the_recipes_that_are_compared(monkeypatch):
    monkeypatch.chdir(bench_step.ROOT)
    exact, others = recipes("sdxl_released", ["rollout.prompts=3"], ["latent_fast", "latent", "fast"])
    assert list(others) == ["fast", "latent", "latent_fast"]
    assert {each.rollout.prompts for each in (exact, *others.values())} == {3}
    assert others["latent"].judge.kind == "latent"
    assert others["latent"].rollout == exact.rollout
    assert others["fast"].rollout.look_ahead == "text"
    assert (others["latent_fast"].judge.kind, others["latent_fast"].optim.guided) == ("latent", "text")
    assert not recipes("sd15", [], [])[1]


def test_the_ratio_is_of_prompts_and_within_rounds():
    """A slow second round, in which both were twice as slow, leaves the ratio as it is."""
    config = lambda prompts: SimpleNamespace(rollout=SimpleNamespace(prompts=prompts))
    baseline = Side(published, None, config(10), rounds=[{"total": 30.0}, {"total": 60.0}, {"total": 30.0}])
    side = Side(published, None, config(5), rounds=[{"total": 5.0}, {"total": 10.0}, {"total": 6.0}])
    assert ratios(baseline, side) == [3.0, 3.0, 2.5]
    side.flops, side.pairs = {"update": 8e12, "update/optimizer": 2e12}, 12
    found = summary(side, rate=5e12)
    assert found["tflop"]["update"] == 10.0
    assert found["share_of_matmul"]["total"] == pytest.approx(10 / 6 / 5)
    assert found["share_of_matmul"]["rollout/decode"] is None
    assert found["pairs_per_second"] == 2.0


@pytest.fixture
def tiny_families(monkeypatch):
    """Tiny networks under the names of the families, of which no files are here."""
    made = json.loads((bench_step.ROOT / "tests" / "golden" / "tiny_configs.json").read_text())
    tiny = {name: each["ctor"] | {"scheduler": each["scheduler"], "model_index": {}} for name, each in made.items()}
    monkeypatch.setattr(find, "FAMILIES", [replace(each, architecture=tiny[each.name]) for each in find.FAMILIES])


def test_networks_that_are_not_here_get_random_weights(recipe, tiny_families):
    """At the family's own size, here a tiny one; every stage does what it would do at full size."""
    config = recipe("nobody/sdxl", rollout={"k": 2, "t_range": (0, 201)})
    latent = varied(config, {"judge.kind": "latent"})
    *_, record = measure(config, {"latent": latent}, 1, CPU)
    sides = record["sides"]
    assert [side["pairs"] for side in sides.values()] == [3 * 2] * 3
    assert 0 < sides["exact"]["tflop"]["update"] < sides["published"]["tflop"]["update"]


def test_random_networks_are_as_the_recipe_asks(recipe, tiny_families):
    models = build(ours.Ours, varied(recipe("nobody/sd"), {"model.gradient_checkpointing": True}), CPU)
    assert models.policy.unet.is_gradient_checkpointing
    with pytest.raises(UserError, match=r"model\.attention.* xformers"):
        build(ours.Ours, varied(recipe("nobody/sd"), {"model.attention": "xformers"}), CPU)


def test_plan_reads_the_share_of_a_known_card(recipe, monkeypatch):
    """Half of the peak: 3 prompts and 12 pairs that would take 0.1 s each at the peak, in 3 s."""
    monkeypatch.setattr(bench_step, "seconds_on", lambda *_: {"prompts": 0.1, "pairs": 0.1})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    models = SimpleNamespace(diffusion=SimpleNamespace(family="sd15"))
    side = Side(published, models, recipe(), pairs=12, rounds=[{"total": 3.0}])
    assert bench_step.at_peak(side, CPU) == {}
    assert bench_step.at_peak(side, torch.device("cuda")) == {"gpu": "a100", "share_of_peak": pytest.approx(0.5)}


def test_the_page_has_the_table_of_the_last_measurement():
    page = (bench_step.ROOT / "docs" / "cost.md").read_text()
    for file in sorted(RESULTS.glob("*/step-*.json")):
        assert table(json.loads(file.read_text())) in page, f"make it anew of {file.name}"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_full_size_on_a_gpu(name):
    exact, others = recipes(name, ["rollout.threshold=0"], bench_step.OTHERS)
    *_, record = measure(exact, others, 2, torch.device("cuda"))
    assert record["faster_per_prompt"]["latent"] > record["faster_per_prompt"]["exact"]
    assert record["faster_per_prompt"]["fast"] > record["faster_per_prompt"]["exact"] > 1
    assert record["sides"]["exact"]["peak_bytes"] < record["sides"]["published"]["peak_bytes"]
