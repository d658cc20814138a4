"""strop evaluate on the golden tiny model: a run's own numbers, one table whatever stops it, sentences for mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from strop.engine import cli
from strop.engine.evaluation import draw, score
from strop.engine.evaluation.geneval import find_images, read_metadata
from strop.engine.evaluation.protocols import GENEVAL, PAPER
from strop.engine.evaluation.sampling import Sampler
from strop.engine.models.lora_file import Lora, read, write
from strop.engine.study.systems import read_systems

ROOT = Path(__file__).parents[1]
BRIEF = ("--protocol", "run", "--batch", "2", "--device", "cpu")  # of two steps
RESULTS = ("results.json", "results.md", "scores.jsonl", "pairs.jsonl", "gallery.html")


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """evaluate(*words, out="out") -> the folder that the command line has written."""
    monkeypatch.setattr(sys, "argv", ["strop"])
    monkeypatch.chdir(tmp_path)

    def main(*words, out="out"):
        cli.main(["evaluate", *BRIEF, *map(str, words), "--out", str(out)])
        return tmp_path / out

    return main


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a b\nc\nd e f\ng\nh i\n")
    return file


def scores(folder):
    lines = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    return {(line["system"], line["number"], line["seed"]): line["scores"] for line in lines}


def contents(folder):
    """Everything that an evaluation leaves but the log of its scores, whose order depends on what was stopped."""
    files = [folder / name for name in RESULTS] + sorted((folder / "images").rglob("*"))
    return {file.relative_to(folder): file.read_bytes() for file in files if file.is_file()}


def test_by_the_protocol_of_the_run_its_own_numbers_come_out(evaluate, training_run, capsys):
    out = evaluate(training_run.folder)
    lines = [json.loads(line) for line in (training_run.folder / "heldout.jsonl").read_text().splitlines()]
    found = scores(out)
    for number, line in enumerate(lines):
        for name in ("brightness", "words"):
            for system, key in (("base", "base"), (training_run.folder.name, "tuned")):
                assert found[system, number, 0][name] == pytest.approx(line["scores"][name][key], abs=2e-5)
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if "/" not in line) <= 80
    assert printed[-1].startswith(f"{training_run.folder.name} against the base: ")


def test_both_formats_of_a_lora_draw_the_same_and_strength_scales_it(evaluate, training_run, prompts):
    lora = training_run.folder / "lora"
    files = f"d={lora / 'pytorch_lora_weights.safetensors'}", f"k={lora / 'run_kohya.safetensors'}"
    out = evaluate(*files, "--prompts", prompts, "--strength", "0,1")
    images = {folder.name: [f.read_bytes() for f in sorted(folder.iterdir())] for folder in (out / "images").iterdir()}
    assert images["d@0"] == images["base"]
    assert images["d@1"] == images["k@1"] != images["base"]
    results = json.loads((out / "results.json").read_text())["scores"]["brightness"]
    assert results["d@0"]["wins"]["rate"] == 0.5
    assert results["d@1"]["delta"] == results["k@1"]["delta"] != 0


@pytest.mark.parametrize("phase", [draw, score], ids=["drawing", "scoring"])
def test_what_was_stopped_goes_on_to_the_same_bytes(phase, evaluate, training_run, prompts, monkeypatch):
    words = training_run.folder, "--prompts", prompts, "--seeds", "2"
    whole = evaluate(*words, out="whole")
    name = {draw: "_draw", score: "scores_by"}[phase]
    done = getattr(phase, name)
    left = iter([True] * {draw: 1, score: 4}[phase])

    def stopping(*arguments):
        if not next(left, False):
            raise KeyboardInterrupt
        return done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(phase, name, stopping)
        with pytest.raises(SystemExit):
            evaluate(*words, out="part")
    part = whole.parent / "part"
    assert (part / "settings.json").is_file()
    assert not (part / "results.json").exists()
    (part / "images" / "base" / "00001-0.png").unlink()
    for log in part.glob("parts/*.jsonl"):
        log.write_bytes(log.read_bytes()[:-9])  # the last line is cut off
    assert contents(evaluate(*words, out="part")) == contents(whole)


def test_systems_scorers_and_images_of_a_prompt_may_be_added(evaluate, training_run, prompts):
    first = scores(evaluate(training_run.folder, "--prompts", prompts))
    more = scores(evaluate(training_run.folder, f"k={training_run.folder}", "--prompts", prompts, "--seeds", "2"))
    assert len(first) == 2 * 5
    assert len(more) == 3 * 5 * 2
    assert first.items() <= more.items()


def test_where_all_is_drawn_a_scorer_is_loaded_once(evaluate, training_run, prompts, monkeypatch):
    before = contents(evaluate(training_run.folder, "--prompts", prompts))
    shutil.rmtree("out/parts")
    loaded, load = [], score.load_scorer
    monkeypatch.setattr(score, "load_scorer", lambda spec, *more: loaded.append(spec) or load(spec, *more))
    assert contents(evaluate(training_run.folder, "--prompts", prompts)) == before
    assert loaded
    assert len(loaded) == len(set(loaded))


def test_another_base_and_a_whole_model(evaluate, training_run, prompts, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    words = training_run.folder, f"theirs={other}", "--prompts", prompts, "--published"
    results = json.loads((evaluate(*words) / "results.json").read_text())
    assert results["scores"]["brightness"]["theirs"]["delta"] == 0
    assert "not measured here" in results["published"]["source"]
    moved = json.loads((evaluate(*words[:1], *words[2:], "--base", other, out="moved") / "results.json").read_text())
    assert moved["systems"]["base"]["model"]["path"] == str(other)
    assert moved["scores"]["brightness"]["run"]["delta"] == results["scores"]["brightness"]["run"]["delta"]


def test_its_pairs_are_a_study(evaluate, training_run, prompts):
    systems = read_systems([str(evaluate(training_run.folder, "--prompts", prompts) / "pairs.jsonl")], None)
    assert systems.names == ["base", training_run.folder.name]
    assert systems.prompts == prompts.read_text().splitlines()
    assert all(file.is_file() for column in systems.files for file in column)


def test_geneval_is_drawn_where_its_script_looks_from_seeds_42_and_on(evaluate, training_run, tmp_path):
    row = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    rows = [row | {"prompt": prompt} for prompt in ("a b", "c")]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = evaluate(training_run.folder, "--prompts", metadata, "--protocol", "geneval")
    for system in ("base", training_run.folder.name):
        folder = out / "images" / system
        found = find_images(folder, read_metadata(metadata))
        assert found == [[folder / f"{n:05}" / "samples" / f"{seed:05}.png" for seed in range(4)] for n in range(2)]
        assert [json.loads((folder / f"{n:05}" / "metadata.jsonl").read_text()) for n in range(2)] == rows
    protocol = json.loads((out / "results.json").read_text())["protocol"]
    assert (protocol["seed"], protocol["seeds"], protocol["noise"]) == (42, 4, "seed")
    assert (out / json.loads((out / "scores.jsonl").read_text().splitlines()[0])["file"]).is_file()


REFUSALS = [
    ("nowhere", "nowhere", "NAME=PATH"),
    ("{run} --protocol papers", "--protocol", "'papers'", "paper?"),
    ("{run} --scorers image_rewards", "--scorers", "'image_rewards'", "image_reward?"),
    ("{run} --scorers nowhere:load", "--scorers", "nowhere"),
    ("{run} --scorers image_reward={hps}", "--scorers", "image_reward", "{hps}", "open_clip"),
    ("{run} --scorers image_reward={cut_scorer}", "--scorers", "{cut_scorer}"),
    ("{run} --prompts nowhere.txt", "--prompts", "nowhere.txt"),
    ("{run} --prompts {empty_file}", "--prompts", "{empty_file}"),
    ("{run} --strength half", "--strength", "'half'"),
    ("{run} --scorers pickscore,pickscore={hps}", "--scorers", "pickscore twice"),
    ("runs/mine", "runs/mine", "no such file"),
    ("{run} --protocol geneval", "--protocol", "--prompts", "evaluation_metadata.jsonl"),
    ("{run} --protocol geneval --prompts {prompts}", "{prompts}: line 1", "JSON"),
    ("{run} --seeds 0", "--seeds", "0"),
    ("{run} {run}", "run", "NAME=PATH"),
    ("base={run}", "base", "NAME=PATH"),
    ("{empty}", "{empty}", "no LoRA"),
    ("{cut}", "{cut}", "cannot be read"),
    ("{run} --base {sdxl}", "{sdxl}", "--base"),
    ("{run} --base nowhere", "nowhere"),
    ("nameless={nameless} --prompts {prompts}", "{nameless}", "--base"),
    ("them={model}", "--base"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, training_run, tiny_folder, tiny_sdxl_folder):
    folder = tmp_path_factory.mktemp("places")
    whole = training_run.folder / "lora" / "pytorch_lora_weights.safetensors"
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("\n")
    (folder / "prompts.txt").write_text("a\n")
    lora = read(whole)
    nameless = write(Lora(lora.down, lora.up, lora.alpha), folder / "nameless.safetensors", "kohya")
    scorers = ROOT / "tests" / "golden" / "eval"
    (folder / "cut.pt").write_bytes((scorers / "imagereward" / "ImageReward_tiny.pt").read_bytes()[:5000])
    return {
        "run": training_run.folder,
        "cut": folder / "cut.safetensors",
        "cut_scorer": folder / "cut.pt",
        "empty": folder / "empty",
        "empty_file": folder / "empty.txt",
        "prompts": folder / "prompts.txt",
        "nameless": nameless,
        "hps": scorers / "hps" / "HPS_v2_tiny.pt",
        "sdxl": tiny_sdxl_folder,
        "model": tiny_folder,
    }


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0])
def test_a_mistake_gets_one_sentence_and_nothing_is_written(row, places, evaluate, tmp_path, capsys):
    command, *words = row
    with pytest.raises(SystemExit) as stopped:
        evaluate(*command.format(**places).split())
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence.startswith("strop: ")
    assert sentence.count("\n") == 1
    assert [word for word in (word.format(**places) for word in words) if word not in sentence] == []
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_gone_on_with(evaluate, training_run, prompts, capsys):
    words = training_run.folder, "--prompts", prompts
    out = evaluate(*words)
    smaller = out / "images" / "base" / "00001-0.png"
    before = contents(out)

    def refused(*arguments, out="out"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            evaluate(*arguments, out=out)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "protocol" in refused(*words, "--protocol", "paper")
    assert "prompts" in refused(words[0])
    assert "dtype" in refused(*words, "--dtype", "bfloat16")
    stranger = f"run={training_run.folder / 'checkpoints' / '000001'}"
    assert "another run" in refused(stranger, "--prompts", prompts)
    assert "exists already" in refused(*words, out=training_run.folder)
    assert contents(out) == before
    Image.new("RGB", (8, 8)).save(smaller)
    assert f"{smaller.name} has 8x8 pixels, expected 16x16" in refused(*words)
    smaller.write_bytes(b"cut off")
    assert f"{smaller.name} is no image" in refused(*words)


@pytest.mark.slow
def test_two_ranks_leave_what_one_leaves(evaluate, training_run, prompts, tmp_path):
    words = training_run.folder, "--prompts", prompts
    alone = evaluate(*words)
    launcher = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "engine" / "evaluate_lora.py", *BRIEF, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--out", tmp_path / "two"], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(alone)


def test_noise_belongs_to_the_number_of_a_prompt_or_to_a_seed(diffusion, policy):
    sampler = Sampler(policy, diffusion, diffusion.schedule(2, 0.0, 1.0))
    of_prompt, of_seed = (draw.noise_of(1, sampler, 3, protocol) for protocol in (PAPER, GENEVAL))
    assert torch.equal(of_prompt, torch.randn(of_prompt.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(of_seed[0], of_seed[2])
    assert torch.equal(of_seed[:1], torch.randn(of_seed[:1].shape, generator=torch.Generator().manual_seed(42 + 1)))
