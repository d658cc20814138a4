"""The report of a run: verdict, tables, pictures and the page, from the run folder alone."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from strop.engine.errors import UserError
from strop.engine.methods.judge_training import columns as judge_training
from strop.engine.methods.spo.columns import COLUMNS
from strop.engine.report.__main__ import main
from strop.engine.report.html import page
from strop.engine.report.pictures import before_after, curves, running_mean
from strop.engine.report.run import Run
from strop.engine.report.run_folder import make_report, read_run, write_summary
from strop.engine.report.tables import closing_table, ledger_rows, stage_rows
from strop.engine.report.verdict import headline, number, verdict

LEDGER = {
    "gpu_hours": 1234.5678, "energy_kwh": 0.8214, "share_of_peak": 0.434, "utilisation": 0.973,
    "sm_mhz": 1395.6, "memory_mhz": None,
    "throttled": {"power_cap": 0.125, "heat": 0.0, "power_brake": 0.01},
}  # fmt: skip


def row(low, high, base=0.5):
    delta = (low + high) / 2
    return {"base": base, "tuned": base + delta, "delta": delta, "ci95": [low, high]}


def record(iteration, **values):
    healthy = {"judge": 0.4 + 0.01 * iteration, "kept": 0.4, "margin": 0.1, "accuracy": 0.6, "clipped": 0.2}
    counts = {"901": 0, "451": 3, "1": iteration}
    return {"iteration": iteration, "grad_norm": 0.3, "pairs_per_t": counts} | healthy | values


def late(**values):
    """Thirty healthy records, of which the last six have these values."""
    return [*HEALTHY[:24], *(record(i, **values) for i in range(25, 31))]


HEALTHY = [record(i) for i in range(1, 31)]
EARLY = [*(record(i, clipped=0.9, accuracy=0.1, kept=0.0) for i in range(1, 24)), *HEALTHY[23:]]
GAPS = [{"iteration": i, "judge": None, "clipped": None} for i in range(1, 31)]
FALLING = [record(i, judge=1 - 0.01 * i) for i in range(1, 31)]
FLAT = [record(i, judge=0.5 + 0.1 * (-1) ** i) for i in range(1, 31)]
SCORES = {"quality": row(0.331, 0.369, base=0.546), "alignment": row(-0.02, 0.01), "judge": row(0.1, 0.2)}
SUMMARY = SCORES | {
    "seconds": {"total": 80.0, "load": 4.0, "rollout": 40.0, "rollout/unet": 24.0, "update": 30.0},
    "prompts": 1200, "pairs": 12345, "optimizer_steps": 66, "iterations": 30, "heldout_prompts": 384,
    "prompts_per_second": 17.142857, "ledger": LEDGER,
    "world_size": 1, "device": "cpu", "seed": 42, "version": "0.1.0",
    "paths": {"run": "runs/a", "lora": "runs/a/lora", "report": "runs/a/report.html"},
}  # fmt: skip
PLEASED = {"quality": row(-0.01, 0.02), "alignment": row(0.01, 0.02), "judge": row(0.1, 0.2)}
VERDICTS = {  # summary, records; the kinds of the findings, a pattern of the headline, words of the findings
    "better": (SUMMARY, HEALTHY, "good open good good", "quality and the judge's score rose",
               "384 0.546 0.896 +0.350 +0.331 +0.369 0.435 0.675"),
    "a loss": (SCORES | {"alignment": row(-0.08, -0.03)}, HEALTHY, "good bad good good",
               "quality.* rose.*alignment fell", "-0.080 -0.030"),
    "chance": ({"judge": row(-0.1, 0.1)}, HEALTHY, "open good", "No change", "-0.100 +0.100"),
    "the judge alone": (PLEASED, HEALTHY, "open good good bad good", "alignment and the judge's score rose", ""),
    "unfinished": ({}, HEALTHY, "open good", "not measured", "30"),
    "clipped": ({}, late(clipped=0.61), "open good bad", "not measured", "61% optim.lr"),
    "a coin": ({}, late(accuracy=0.5), "open good bad", "not measured", "50%"),
    "few pairs": ({}, late(kept=0.004), "open good bad", "not measured", "0.4% rollout.threshold"),
    "infinite": ({}, late(nonfinite=["loss"]), "open good bad", "not measured", "25 loss"),
    "signs that have passed": ({}, EARLY, "open good", "not measured", ""),
    "nothing measured": ({}, GAPS, "open", "not measured", "30"),
    "a falling judge": ({}, FALLING, "open bad", "not measured", "0.965 0.725"),
    "a flat judge": ({}, FLAT, "open open", "not measured", ""),
}  # fmt: skip


def written(folder, records, summary, recipe):
    """The folder of a run."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(recipe)
    write_summary(folder, summary)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    recipe = "model:\n  path: weights/base\nrollout:\n  t_range: [0, 901]\n  threshold: 0.1 # <\n"
    folder = written(tmp_path / "first <run>", HEALTHY, SUMMARY, recipe)
    images = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    before_after(images, -images, ["a red circle"], folder / "before_after.png")
    return folder


@pytest.fixture
def judge_dir(tmp_path):
    """The folder of a run that trained a judge."""
    accuracy = {"0": 0.75, "251": 0.75, "501": 0.7, "701": 0.6, "951": None}
    lines = [{"iteration": i, "loss": 0.7, "heldout_accuracy": None if i % 3 else accuracy} for i in range(9)]
    counts = {"prompts": 640, "pairs": 640, "training_pairs": 200, "heldout_pairs": 64, "prompts_per_second": 5.25}
    compared = {"accuracy at t=0": row(0.01, 0.03, base=0.75), "accuracy at t=251": row(-0.1, 0.1, base=0.75)}
    recipe = "model:\n  path: weights/base\ndata:\n  source: pairs.jsonl\n"
    return written(tmp_path / "run", lines, compared | counts | {"paths": {"judge": "runs/judge/judge"}}, recipe)


def cells(table):
    return [re.split(r"  +", line.strip()) for line in table.splitlines()]


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


@pytest.mark.parametrize("summary, records, kinds, first, words", VERDICTS.values(), ids=VERDICTS)
def test_the_verdict(summary, records, kinds, first, words):
    findings = verdict(Run(Path("run"), records, summary, ""))
    assert " ".join(finding.kind for finding in findings) == kinds
    said, above = " ".join(finding.text for finding in findings), headline(findings)
    assert [word for word in words.split() if word not in said] == []
    assert re.search(first, above)
    assert ("no warning" in above) == ("bad" not in kinds)


def test_stages_keep_their_parts_and_the_rest_is_other():
    seconds = {"load": 5.0, "rollout": 50.0, "update": 20.0, "rollout/unet": 40.0, "total": 100.0}
    assert stage_rows(seconds) == [
        ("load", "5.0 s", 0.05), ("rollout", "50.0 s", 0.5), ("rollout/unet", "40.0 s", 0.4), ("update", "20.0 s", 0.2),
        ("other", "25.0 s", 0.25), ("total", "100.0 s", 1.0),
    ]  # fmt: skip
    assert stage_rows({"rollout": 3700.0}) == [("rollout", "1:01:40", None)]


def test_closing_table_has_the_figures_and_fits():
    table = closing_table(SUMMARY)
    expected = (
        ["quality", "0.546", "0.896", "+0.350", "+0.331 to +0.369"],
        ["rollout", "40.0 s", "50.0%"],
        ["unet", "24.0 s", "30.0%"],
        ["preference pairs", "12,345"],
        ["lora", "runs/a/lora"],
    )
    assert [line for line in expected if line not in cells(table)] == []
    assert re.search(r"\nprompts per second +17\.1 ", table)
    without = closing_table(SUMMARY | {"ledger": "not available"})
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
    assert ledger_rows({"ledger": "not available"}) == ledger_rows({}) == everything


def test_closing_table_says_what_was_not_measured():
    table = cells(closing_table({"judge": {"base": 0.5, "tuned": 0.6, "delta": 0.1, "ci95": None}}))
    assert ["judge", "0.500", "0.600", "+0.100", "not measured"] in table
    assert ["preference pairs", "not measured"] in table
    assert "not measured" in closing_table({}).splitlines()[0]


def test_the_command_remakes_a_page_that_holds_its_pictures_and_fetches_nothing(run_dir, capsys):
    main([str(run_dir)])
    printed = capsys.readouterr().out
    assert printed.startswith(headline(verdict(read_run(run_dir)))[:40])
    assert [line for line in printed.splitlines() if len(line) > 80 and "/" not in line] == []
    text = (run_dir / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(data) for data in pictures] == [
        (run_dir / name).read_bytes() for name in ("before_after.png", "curves.png")
    ]
    text = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", text)
    shown = ("+0.331 to +0.369", "12,345", "weights/base", "threshold: 0.1 # &lt;", "weights(&#x27;runs/a/lora")
    assert [words for words in (*shown, "first &lt;run&gt;") if words not in text] == []
    assert "nan" not in text.lower()


@pytest.mark.parametrize(
    "path, family, call",
    [
        ("owner/name", "sdxl", "AutoPipelineForText2Image.from_pretrained(&#x27;owner/name&#x27;)"),
        ("x.safetensors", "sd15", "StableDiffusionPipeline.from_single_file(&#x27;x.safetensors&#x27;)"),
        ("x.safetensors", "sdxl", "StableDiffusionXLPipeline.from_single_file(&#x27;x.safetensors&#x27;)"),
    ],
)
def test_the_page_says_how_to_draw_with_the_lora_on_its_base(path, family, call):
    assert call in page(Run(Path("run"), [], SUMMARY | {"family": family}, f"model:\n  path: {path}\n"))


def test_page_of_a_killed_run(run_dir):
    for name in ("summary.json", "before_after.png", "config.yaml"):
        (run_dir / name).unlink()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 31, "jud')
    text = make_report(run_dir).read_text()
    assert "iteration 30" in text
    assert "before_after.png" in text, "it is said to be missing"
    (run_dir / "metrics.jsonl").write_text("")
    assert "nothing" in page(read_run(run_dir))


def test_page_and_table_of_a_judge_speak_of_pairs_and_of_no_lora(judge_dir):
    text = page(read_run(judge_dir))
    words = ("accuracy at t=0 rose", "0.750", "0.770", "64 held-out pairs")
    assert [word for word in words if word not in text] == []
    others = ("lora", "before and after", "before_after", "prompts", "rollout")
    assert [word for word in others if word in text.lower()] == []
    table = closing_table(read_run(judge_dir).summary)
    for line in (["pairs shown", "640"], ["training pairs", "200"], ["held-out pairs", "64"]):
        assert line in cells(table)
    assert re.search(r"\npairs per second +5\.25 ", table)
    assert "prompts" not in table


def test_a_judge_that_is_not_measured_yet(judge_dir):
    (judge_dir / "summary.json").unlink()
    run = read_run(judge_dir)
    assert run.columns is judge_training.COLUMNS
    findings = verdict(run)
    assert "iteration 8" in findings[0].text
    assert re.search("pairs.* not measured", headline(findings, run.heldout))


def test_the_judged_timesteps_are_those_of_the_recipe(run_dir):
    assert read_run(run_dir).t_range == (0, 901)
    (run_dir / "config.yaml").unlink()
    assert read_run(run_dir).t_range == (0, 999)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metrics.jsonl", '{"iteration": 1}\n{"it\n{"iteration": 3}\n', "line 2"),
        ("summary.json", '{"quality": {"base"', "summary.json"),
        ("summary.json", "[]", "list"),
        ("config.yaml", "model: [", "first <run>"),
        ("config.yaml", "model", "str"),
        ("metrics.jsonl", None, "metrics.jsonl"),
    ],
)
def test_a_broken_folder_is_one_sentence(run_dir, name, content, words):
    (run_dir / name).unlink()
    if content:
        (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_run(run_dir)
    assert "\n" not in str(caught.value)


def test_before_after_places_each_image_unchanged(tmp_path):
    base = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 64, 32)
    tuned = torch.tensor([1.0, -1.0, 7.0]).reshape(1, 3, 1, 1).expand(2, 3, 64, 32)
    before_after(base, tuned, ["a", "b " * 300], tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png"))
    first = (pixels == [0, 128, 255]).all(-1)
    second = (pixels == [255, 0, 255]).all(-1)
    assert first.sum() == second.sum() == 2 * 160 * 320  # two columns, 160 wide, the aspect kept
    assert np.argwhere(first)[:, 0].max() < np.argwhere(second)[:, 0].min()
    with pytest.raises(ValueError, match="before_after"):
        before_after(base, tuned, ["one"], tmp_path / "picture.png")


def test_running_mean_leaves_out_what_was_not_measured():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    assert running_mean(values, 3) == pytest.approx([1.0, 2.0, 3.0, 3.0, np.nan, np.nan], nan_ok=True)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_curves_of_any_length_and_with_gaps(tmp_path, count):
    gaps = [record(5 * i, margin=None, accuracy=None if i % 2 else 0.5) for i in range(1, count + 1)]
    gaps[1:2] = [line | {"pairs_per_t": None} for line in gaps[1:2]]
    curves(gaps, COLUMNS, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert picture.width > 1400
    assert np.asarray(picture.convert("L")).std() > 5
