"""The report of a run: statistics, sentences, tables, pictures and the page, from the run folder alone."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from strop.engine.errors import UserError
from strop.engine.methods.judge_training import columns as judge_training
from strop.engine.methods.spo.columns import COLUMNS
from strop.engine.report.__main__ import main
from strop.engine.report.pictures import before_after, curves, running_mean
from strop.engine.report.run import Run
from strop.engine.report.run_folder import make_report, read_run, write_heldout, write_summary
from strop.engine.report.tables import closing_table, ledger_rows, stage_rows
from strop.engine.report.verdict import number, verdict
from strop.engine.runtime.columns import LEFT_OUT

LEDGER = {
    "gpu_hours": 1234.5678, "energy_kwh": 0.8214, "share_of_peak": 0.434, "utilisation": 0.973,
    "sm_mhz": 1395.6, "memory_mhz": None,
    "throttled": {"power_cap": 0.125, "heat": 0.0, "power_brake": 0.01},
}  # fmt: skip


HELDOUT = ["a red circle", "two <squares>", "a star", "a cross", "a moon"]


def row(low, high, base=0.5):
    delta = (low + high) / 2
    p = 0.5 if low < 0 < high else 1e-4
    return {"base": base, "tuned": base + delta, "delta": delta, "n": 384, "ci95": [low, high], "p": p}


def a_record(iteration, **values):
    healthy = {"judge": 0.4 + 0.01 * iteration, "kept": 0.4, "margin": 0.1, "accuracy": 0.6, "clipped": 0.2}
    counts = {"901": 0, "451": 3, "1": iteration}
    return {"iteration": iteration, "grad_norm": 0.3, "pairs_per_t": counts} | healthy | values


def a_run(summary):
    return Run(Path("run"), [], summary, "")


@pytest.fixture
def records():
    return [a_record(i) for i in range(1, 31)]


@pytest.fixture
def summary():
    return {
        "quality": row(0.331, 0.369, base=0.546), "alignment": row(-0.02, 0.01), "judge": row(0.1, 0.2),
        "seconds": {"total": 80.0, "load": 4.0, "rollout": 40.0, "rollout/unet": 24.0, "update": 30.0},
        "prompts": 1200, "pairs": 12345, "optimizer_steps": 66, "iterations": 30, "heldout_prompts": 384,
        "prompts_per_second": 17.142857, "ledger": LEDGER,
        "world_size": 1, "device": "cpu", "seed": 42, "version": "0.1.0",
        "paths": {"run": "runs/a", "lora": "runs/a/lora", "report": "runs/a/report.html"},
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path, records, summary):
    run_dir = tmp_path / "first <run>"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = "model:\n  path: weights/base\nrollout:\n  t_range: [0, 901]\n  threshold: 0.1 # <\n"
    (run_dir / "config.yaml").write_text(recipe)
    write_summary(run_dir, summary)
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    before_after(images, -images, HELDOUT[:2], run_dir / "before_after.png")
    base = {"judge": torch.arange(5.0), "quality": torch.zeros(5)}
    tuned = {"judge": torch.arange(5.0), "quality": torch.tensor([0.25, -0.5, 0.0, 0.125, 0.75])}
    write_heldout(run_dir, HELDOUT, base, tuned)
    return run_dir


def test_summary_is_valid_json_and_leaves_no_draft(tmp_path):
    path = write_summary(tmp_path, {"quality": {"delta": math.nan, "ci95": [math.inf, 1.0]}, "seed": 1})
    assert json.loads(path.read_text()) == {"quality": {"delta": None, "ci95": [None, 1.0]}, "seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    "value, sign, text",
    [(0.35, "+", "+0.350"), (-0.0573, "+", "-0.057"), (0.00123, "", "0.0012"), (0, "+", "+0.000"),
     (21.4321, "", "21.432"), (None, "", "not measured"), (math.nan, "", "not measured")],
)  # fmt: skip
def test_number(value, sign, text):
    assert number(value, sign) == text


def test_stages_keep_their_parts_and_the_rest_is_other():
    seconds = {"load": 5.0, "rollout": 50.0, "update": 20.0, "rollout/unet": 40.0, "total": 100.0}
    assert stage_rows(seconds) == [
        ("load", "5.0 s", 0.05), ("rollout", "50.0 s", 0.5), ("rollout/unet", "40.0 s", 0.4), ("update", "20.0 s", 0.2),
        ("other", "25.0 s", 0.25), ("total", "100.0 s", 1.0),
    ]  # fmt: skip
    assert stage_rows({"rollout": 3700.0}) == [("rollout", "1:01:40", None)]


def test_closing_table_has_the_figures_and_fits(summary):
    table = closing_table(a_run(summary))
    lines = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    assert ["quality", "0.546", "0.896", "+0.350", "+0.331 to +0.369"] in lines
    assert ["rollout", "40.0 s", "50.0%"] in lines
    assert ["unet", "24.0 s", "30.0%"] in lines
    assert ["preference pairs", "12,345"] in lines
    assert ["lora", "runs/a/lora"] in lines
    assert ["prompts per second", "17.1 in rollout and update"] in lines
    assert ["energy", "0.821 kWh"] in lines
    without = closing_table(a_run(summary | {"ledger": "not available"}))
    assert max(map(len, f"{table}\n{without}".splitlines())) <= 80


def test_the_ledger_in_words():
    assert ledger_rows({"ledger": LEDGER}) == [
        ("GPU-hours", "1,234.568"),
        ("energy", "0.821 kWh"),
        ("share of peak", "43.4% in rollout and update"),
        ("utilisation", "97.3%"),
        ("SM clock", "1,396 MHz"),
        ("throttled", "12.5% of the time by power cap, 1.0% of the time by power brake"),
        ("not available", "memory clock"),
    ]
    calm = LEDGER | {"throttled": {"power_cap": 0.0}, "memory_mhz": 1593.0}
    assert ledger_rows({"ledger": calm})[-2:] == [("memory clock", "1,593 MHz"), ("throttled", "none")]
    everything = [("not available", "GPU-hours, energy, share of peak, utilisation, SM clock, memory clock, throttled")]
    assert ledger_rows({"ledger": "not available", "device": "some GPU"}) == everything
    assert ledger_rows({"ledger": "not available", "device": "cpu"}) == ledger_rows({}) == []


def test_closing_table_says_what_was_not_measured():
    rates = {"base": 0.5, "tuned": 0.6, "delta": 0.1, "ci95": None}
    for more, reason in (({}, "not measured"), ({"n": 7}, "too few to say"), ({"n": 8}, "all changes alike")):
        table = closing_table(a_run({"judge": rates | more}))
        assert re.search(rf"judge +0\.500 +0\.600 +\+0\.100 +{reason}", table)
    assert re.search(r"preference pairs +not measured", table)
    assert "held-out scores are not measured" in closing_table(a_run({}))


def test_page_holds_its_pictures_and_fetches_nothing(run_dir):
    text = make_report(run_dir).read_text()
    pictures = [decoded(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    base, tuned = (cut[0, 0] for cut in pictures[2:4])  # after those of the prompts that changed most and least
    assert (base + tuned == 255).all(), "the tuned images are the negatives"
    assert len(pictures) == 2 * 2 + 2 * 2 + sum(column.drawn is not None for column in COLUMNS)
    words = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", words)
    shown = ("+0.331 to +0.369", "12,345", "weights/base", "threshold: 0.1 # &lt;", "weights(&#x27;runs/a/lora")
    assert [each for each in shown if each not in words] == []
    assert "first &lt;run&gt;" in words
    assert "nan" not in words.lower()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def test_page_names_the_prompts_that_changed_most_and_least(run_dir):
    text = re.sub(r"<[^>]+>", " ", make_report(run_dir).read_text())
    section = text[text.index("Most and least changed") : text.index("Before and after")]
    places = [section.index(prompt) for prompt in ("a moon", "a red circle", "two &lt;squares&gt;", "a star")]
    assert places == sorted(places)
    assert all(change in section for change in ("+0.750", "+0.250", "-0.500"))


def test_page_says_what_ran_and_links_to_what_lies_in_the_folder(run_dir, summary):
    (run_dir / "lora").mkdir()
    recipe = {"model": {"path": "weights/base"}, "judge": {"path": "weights/judge"}, "optim": {"lr": 5e-4}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))
    text = make_report(run_dir).read_text()
    head = text[text.index("<header>") : text.index("</header>")]
    assert [
        each for each in ("SPO", "weights/base", "weights/judge", "30 iterations", "0.0005") if each not in head
    ] == []
    links = re.findall(r'href="([^"]+)"', text)
    assert {"lora", "metrics.jsonl", "heldout.jsonl"} <= set(links)
    assert all((run_dir / link).exists() for link in links)


def test_page_of_a_run_on_a_cpu_is_silent_about_gpus(run_dir, summary):
    assert "What it cost the GPU" in make_report(run_dir).read_text()
    write_summary(run_dir, summary | {"ledger": "not available"})
    assert "the GPU" not in make_report(run_dir).read_text()


def test_page_of_a_killed_run(run_dir):
    for name in ("summary.json", "before_after.png", "config.yaml", "heldout.jsonl"):
        (run_dir / name).unlink()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 31, "jud')
    text = make_report(run_dir).read_text()
    assert "The run is not finished: it has logged iteration 30 so far." in text
    assert "not measured: there is no before_after.png" in text


def test_page_of_an_older_run_shows_its_pictures_as_one(run_dir):
    (run_dir / "heldout.jsonl").unlink()
    Image.open(run_dir / "before_after.png").convert("RGB").save(run_dir / "before_after.png")
    data = base64.b64encode((run_dir / "before_after.png").read_bytes()).decode()
    text = make_report(run_dir).read_text()
    assert data in text
    assert "Most and least changed" not in text


@pytest.fixture
def judge_dir(tmp_path):
    """The folder of a run that trained a judge."""
    run_dir = tmp_path / "judge-run"
    run_dir.mkdir()
    accuracy = {"0": 0.75, "251": 0.75, "501": 0.7, "701": 0.6, "951": None}
    lines = [{"iteration": i, "loss": 0.7, "heldout_accuracy": None if i % 3 else accuracy} for i in range(9)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.yaml").write_text("model:\n  path: weights/base\ndata:\n  source: pairs.jsonl\n")
    counts = {"prompts": 640, "pairs": 640, "training_pairs": 200, "heldout_pairs": 64, "prompts_per_second": 5.25}
    compared = {"accuracy at t=0": row(0.01, 0.03, base=0.75), "accuracy at t=251": row(-0.1, 0.1, base=0.75)}
    write_summary(run_dir, compared | counts | {"paths": {"judge": "runs/judge/judge"}})
    return run_dir


def test_page_of_a_judge_speaks_of_pairs_and_of_no_lora(judge_dir):
    text = make_report(judge_dir).read_text()
    for words in ("On held-out pairs accuracy at t=0 rose", "64 held-out pairs", "from 0.750 to 0.770"):
        assert words in text
    said = re.sub(r"base64,[^\"]+", "", text).lower()
    assert [word for word in ("lora", "before and after", "before_after", "prompts", "rollout") if word in said] == []


def test_closing_table_of_a_judge_counts_pairs(judge_dir):
    lines = [re.split(r"  +", line) for line in closing_table(read_run(judge_dir)).splitlines()]
    assert ["pairs shown", "640"] in lines
    assert ["pairs per second", "5.25 in show and update"] in lines
    assert ["training pairs", "200"] in lines
    assert ["held-out pairs", "64"] in lines
    assert not any("prompts" in cell for line in lines for cell in line)


def test_a_judge_that_is_not_measured_yet(judge_dir):
    (judge_dir / "summary.json").unlink()
    run = read_run(judge_dir)
    assert run.columns == (*judge_training.COLUMNS, LEFT_OUT)
    assert "not finished: it has logged iteration 8" in verdict(run).findings[0].text
    assert "not measured" in verdict(run).headline


def test_page_before_the_first_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "it has logged nothing so far" in make_report(tmp_path).read_text()


def test_the_judged_timesteps_are_those_of_the_recipe(run_dir):
    assert read_run(run_dir).t_range == (0, 901)
    (run_dir / "config.yaml").unlink()
    assert read_run(run_dir).t_range == (0, 999)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.jsonl", '{"iteration": 1}\n{"it\n{"iteration": 3}\n', "metrics.jsonl: line 2 is not a record"),
        ("summary.json", '{"quality": {"base"', "summary.json cannot be read as JSON"),
        ("summary.json", "[]", "summary.json holds a JSON list"),
        ("heldout.jsonl", "{}\n{", "heldout.jsonl: line 2 is not JSON"),
        ("config.yaml", "model: [", "cannot be read"),
        ("config.yaml", "model", "config.yaml: found str"),
        ("metrics.jsonl", None, "there is no metrics.jsonl"),
    ],
)
def test_a_broken_folder_is_one_sentence(run_dir, name, content, words):
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        read_run(run_dir)
    assert "\n" not in str(caught.value)


def test_the_command_remakes_the_report_and_prints_its_verdict_last_within_80_columns(run_dir, capsys):
    main([str(run_dir)])
    printed = capsys.readouterr().out
    assert printed.split("\n\n")[-1].replace("\n", " ").strip() == verdict(read_run(run_dir)).headline
    assert [line for line in printed.splitlines() if len(line) > 80 and "/" not in line] == []
    assert (run_dir / "report.html").exists()


def test_before_after_places_each_image_unchanged(tmp_path):
    base = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 64, 32)
    tuned = torch.tensor([1.0, -1.0, 7.0]).reshape(1, 3, 1, 1).expand(2, 3, 64, 32)
    before_after(base, tuned, ["a", "b " * 300], tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png"))
    first = (pixels == [0, 128, 255]).all(-1)
    second = (pixels == [255, 0, 255]).all(-1)
    assert first.sum() == second.sum() == 2 * 160 * 320  # two columns, 160 wide, the aspect kept
    assert np.argwhere(first)[:, 0].max() < np.argwhere(second)[:, 0].min()


def test_before_after_wants_matching_batches(tmp_path):
    with pytest.raises(ValueError, match="before_after needs"):
        before_after(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), ["one"], tmp_path / "picture.png")


def test_running_mean_leaves_out_what_was_not_measured():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    assert running_mean(values, 3) == pytest.approx([1.0, 2.0, 3.0, 3.0, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_curves_of_any_length_and_with_gaps(tmp_path, count):
    gaps = [a_record(5 * i, margin=None, accuracy=None if i % 2 else 0.5) for i in range(1, count + 1)]
    gaps[1:2] = [record | {"pairs_per_t": None} for record in gaps[1:2]]
    curves(gaps, COLUMNS, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.width > 1400
    assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    "path, family, call",
    [
        ("owner/name", "sdxl", "AutoPipelineForText2Image.from_pretrained(&#x27;owner/name&#x27;)"),
        ("x.safetensors", "sd15", "StableDiffusionPipeline.from_single_file(&#x27;x.safetensors&#x27;)"),
        ("x.safetensors", "sdxl", "StableDiffusionXLPipeline.from_single_file(&#x27;x.safetensors&#x27;)"),
    ],
)
def test_the_page_says_how_to_draw_with_the_lora_on_its_base(run_dir, summary, path, family, call):
    (run_dir / "metrics.jsonl").write_text("")
    (run_dir / "config.yaml").write_text(f"model:\n  path: {path}\n")
    write_summary(run_dir, summary | {"family": family})
    assert call in make_report(run_dir).read_text()
