"""What a person can get wrong on a command line: one sentence that names it, exit code 2, and nothing written.

A row of the table is a command line and words that the sentence must hold. {names} stand for the places below.
"""

import shutil
import sys

import pytest
import torch

from strop.engine import cli
from strop.engine.config.training import ModelConfig
from strop.engine.models.base_model import load_unet
from strop.engine.models.policy import Policy

MERGED = "--format merged --out {new}"
REFUSALS = [
    ("tran sd15", "'tran'", "train"),
    ("train tinyworld", "bench/tinyworld/weights/sd", "checkout"),
    ("train {training} rollout.inner_step=3", "rollout.inner_step;", "rollout.inner_steps?"),
    ("train {training} rollout.k=four", "rollout.k", "'four'"),
    ("train {training} optim.clip=1.5", "optim.clip", "1.5"),
    ("train {training} nonsense", "'nonsense'", "section.key=value"),
    ("train {training} model.path=nowhere", "model.path", "nowhere"),
    ("train {training} judge.path=nowhere", "judge.path", "nowhere"),
    ("train {training} prompts.train=nowhere.txt", "prompts.train", "nowhere.txt"),
    ("train {training} prompts.train={empty}", "prompts.train", "{empty}"),
    ("train {training} prompts.heldout={overlap}", "prompts.heldout", "1 prompts", "'d e'"),
    ("train {training} evaluate.prompts=4", "evaluate.prompts", "4", "1 (the processes) to 3"),
    ("train {training} evaluate.prompts=3 prompts.heldout=null", "evaluate.prompts", "3", "to 2"),
    ("train {training} evaluate.scorers=[nowhere:load]", "evaluate.scorers", "nowhere"),
    ("train {training} lora.target_modules=[to_x]", "lora.target_modules", "['to_x']"),
    ("train {training} rollout.judge_every=4", "rollout.judge_every", "4", "3"),
    ("train {training} rollout.decoder=nowhere", "rollout.decoder", "nowhere"),
    ("train {training} optim.accumulate=5", "optim.accumulate", "5", "at most 4"),
    ("train {training} run.resume=true", "run.resume", "holds no checkpoint"),
    ("train {training} run.dir={file}/run", "run.dir", "{file}"),
    ("train {training} run.dir={run}", "run.dir", "{run}", "run.resume=true"),
    ("train {training} run.dir={run} run.resume=true optim.beta=5", "run.resume", "optim.beta: 10.0 -> 5.0"),
    ("train {training} run.dir={run} run.resume=true lora.rank=8", "run.resume", "lora.rank: 4 -> 8"),
    ("train {training} run.dir={replaced} run.resume=true run.iterations=3", "{replaced}", "rank 2", "lora.rank"),
    ("train-judge {judge} optim.step=3", "optim.step;", "optim.steps?"),
    ("train-judge {judge} model.path=nowhere", "model.path", "nowhere"),
    ("train-judge {judge} judge.path=nowhere", "judge.path", "nowhere"),
    ("train-judge {judge} data.source=bright_pairs", "data.source", "bright_pairs", "parquet", ".jsonl"),
    ("train-judge {judge} data.source=dark_pairs:load", "data.source", "dark_pairs"),
    (
        "train-judge {judge} data.source={broken}/pairs.jsonl data.train=null data.heldout=6",
        "1 of 26",
        "data.max_broken",
    ),
    ("train-judge {judge} optim.warmup=6", "warmup", "steps", "6"),
    ("train-judge {judge} run.device=tpu", "run.device", "'tpu'"),
    ("train-judge {judge} run.dir={file}/run", "run.dir", "{file}"),
    ("train-judge {judge} run.dir={run}", "run.dir", "{run}", "run.resume=true"),
    (
        "train-judge {judge} run.dir={judge_run} run.resume=true optim.lr=1e-4",
        "run.resume",
        "optim.lr: 0.001 -> 0.0001",
    ),
    ("train-judge {judge} run.dir={judge_run} run.resume=true data.heldout=9", "run.resume", "data.heldout: 20 -> 9"),
    ("plan nothing.yaml", "nothing.yaml"),
    ("plan {training} --gpu abacus", "--gpu", "'abacus'", "a100"),
    ("plan {training} --gpus 0", "--gpus", "0"),
    ("plan {training} --prompts -3", "--prompts", "-3"),
    ("plan {training} --share 1.5", "--share", "1.5"),
    ("plan {training} --json nowhere/plan.json", "--json", "nowhere/plan.json"),
    ("plan {training} rollout.t_range=[3,9]", "rollout.t_range", "[3, 9]"),
    ("plan {training} rollout.judge_every=99", "rollout.judge_every", "99", "3"),
    ("plan {training} model.height=65", "model.height", "65"),
    ("plan {training} model.path={loras}", "{loras}", "unet/"),
    ("plan {training} judge.path={unet}", "{unet}", "clip"),
    ("report nowhere", "nowhere", "run folder"),
    ("export nowhere --format kohya --out {new}", "nowhere"),
    ("export {run}/checkpoints --format kohya --out {new}", "checkpoints", "no LoRA"),
    ("export {unet}/diffusion_pytorch_model.safetensors --format kohya --out {new}", "no LoRA"),
    ("export {unet}/config.json --format kohya --out {new}", "config.json"),
    ("export {loras} --format kohya --out {new}", "{loras}", "2 .safetensors"),
    ("export {run} --format onnx --out {new}", "--format", "'onnx'", "kohya"),
    ("export {run} --format kohya --out {new} --dtype float8", "--dtype", "'float8'", "bfloat16"),
    ("export {run} --format diffusers --out {run}/lora", "--out", "pytorch_lora_weights.safetensors"),
    ("export {run} --format kohya --out {run}/lora/run_kohya.safetensors", "--out", "run_kohya.safetensors"),
    ("export {run} --format merged --out {model}", "--out", "unet"),
    ("export {run} --format merged --out a.safetensors", "--out", "a.safetensors", "folder"),
    ("export {run} --format kohya --out {file}/a", "--out", "{file}"),
    (f"export {{run}} {MERGED} --base nowhere", "nowhere", "--base"),
    (f"export {{run}} {MERGED} --base {{sdxl}}", "(sd15)", "{sdxl}", "--base"),
    (f"export {{nameless}} {MERGED}", "{nameless}", "--base"),
]


@pytest.fixture(scope="module")
def places(recipe_folder, training_run, judge_run, tiny_folder, tiny_sdxl_folder, pair_files, tmp_path_factory):
    """The files and folders that the table names; none of them may change."""
    folder = tmp_path_factory.mktemp("places")
    for name, text in (("empty", "\n \n"), ("overlap", "g\nd e\nj\n"), ("file", "not a folder")):
        (folder / name).write_text(text)
    pair_files.jsonl(folder / "broken", pair_files.rows(32))
    (folder / "broken" / "images" / "9-1.jpg").write_bytes(b"not an image")
    other = Policy(
        load_unet(ModelConfig(path=str(tiny_folder)), torch.device("cpu")),
        2,
        ("to_q", "to_k", "to_v", "to_out.0"),
        seed=0,
    )
    shutil.copytree(training_run.folder, folder / "replaced")
    other.save_lora(folder / "replaced" / "checkpoints" / "000002")
    other.save_lora(folder / "nameless")
    (folder / "loras").mkdir()
    for name in "ab":
        shutil.copy(training_run.folder / "lora" / "run_kohya.safetensors", folder / "loras" / f"{name}.safetensors")
    named = {name: folder / name for name in ("empty", "overlap", "file", "broken", "replaced", "nameless", "loras")}
    named |= {"training": recipe_folder / "training.yaml", "judge": recipe_folder / "judge.yaml"}
    named |= {"run": training_run.folder, "judge_run": judge_run.folder}
    return named | {"model": tiny_folder, "sdxl": tiny_sdxl_folder, "unet": tiny_folder / "unet"}


def contents(places):
    """When each file of the places was last written to."""
    return {file: file.stat().st_mtime_ns for place in places.values() for file in [place, *place.rglob("*")]}


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0])
def test_a_mistake_gets_one_sentence_and_nothing_is_written(row, places, tmp_path, monkeypatch, capsys):
    command, *words = row
    monkeypatch.setattr(sys, "argv", ["strop"])
    monkeypatch.chdir(tmp_path)
    before = contents(places)
    names = {**places, "new": "new"}
    arguments = [argument.format(**names) for argument in command.split()]
    if arguments[0] in ("train", "train-judge", "plan"):
        arguments.insert(2, "run.dir=new")
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence.startswith("strop: ")
    assert sentence.count("\n") == 1
    assert [word for word in (word.format(**names) for word in words) if word not in sentence] == []
    assert not (tmp_path / "new").exists()
    assert contents(places) == before
