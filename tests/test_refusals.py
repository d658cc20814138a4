"""What a person can get wrong on a command line: one sentence that names it, exit code 2, and nothing written.

A row of the first table is a command line and words that the sentence must hold; {names} stand for the places below.
A row of the second is a file besides, {bad} in the command line, and how it is made.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from strop.engine import cli
from strop.engine.config.training import ModelConfig
from strop.engine.models.base_model import load_unet
from strop.engine.models.lora_file import ADAPTER
from strop.engine.models.policy import Policy

MOST_GROWTH = 1.5 * 2**30  # bytes that a refusal may take
MERGED = "--format merged --out {new}"
ONE_SCORE = "{new} --scorers clip_score --gap clip_score=0 --tie-gap clip_score=3"
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
    ("train {training} audit.every=0 audit.path={model}", "audit.every", "0", "greater than or equal to 1"),
    ("train {training} audit.every=2", "audit: every", "without path"),
    ("train {training} audit.path={model}", "audit: path", "without every"),
    ("train {training} audit.every=2 audit.path=nowhere", "audit.path", "nowhere"),
    ("train {training} audit.every=2 audit.path={swapped}", "audit.kind", "spm", "audit.kind=pickscore"),
    ("train {training} audit.every=2 audit.path={swapped} audit.kind=latent", "audit.path", "{swapped}", "audit.kind"),
    ("train {training} audit.every=2 audit.path={swapped} audit.kind=clip", "audit.kind", "'clip'"),
    ("train {pairs} audit.every=2", "audit", "diffusion_dpo", "gradspo, spo"),
    ("train {training} run.resume=true", "run.resume", "holds no checkpoint"),
    ("train {training} run.dir={file}/run", "run.dir", "{file}"),
    ("train {training} run.dir={run}", "run.dir", "{run}", "run.resume=true"),
    ("train {training} run.dir={run} run.resume=true optim.beta=5", "run.resume", "optim.beta: 10.0 -> 5.0"),
    ("train {training} run.dir={run} run.resume=true lora.rank=8", "run.resume", "lora.rank: 4 -> 8"),
    ("train {training} run.dir={replaced} run.resume=true run.iterations=3", "{replaced}", "000001", "newest_whole"),
    ("train {training} run.dir={run} run.resume=true run.iterations=1", "run.iterations", "1", "2"),
    ("train {training} run.dir={run} run.resume=true prompts.train={other}", "prompts.train", "{other}"),
    ("train {training} run.dir={run} run.resume=true model.vae={model}/vae", "model.vae", "{model}/vae"),
    ("train {training} run.dir={run} run.resume=true judge.path={swapped}", "judge.path", "model.safetensors"),
    ("train {training} run.dir={own} run.resume=auto", "run.dir", "{own}", "not empty"),
    ("train {training} run.dir={early}", "{early}", "run.resume=auto"),
    ("train {pairs} data.source=nowhere", "data.source", "nowhere", "parquet", ".jsonl"),
    ("train {pairs} data.source=nowhere:load", "data.source", "nowhere"),
    ("train {pairs} data.source=recipe_modules:ties", "data.source", "all 40 pairs", "ties"),
    ("train {pairs} data.source=strop.bench.tinyworld.pairs:load", "data.source", "(3, 64, 64)", "(3, 16, 16)"),
    (
        "train {pairs} data.source={broken}/pairs.jsonl data.train=null run.iterations=9",
        "data.source",
        "line 10",
        "data.max_broken",
    ),
    ("train {pairs} data.train=null", "data.train", "recipe_modules:pairs"),
    ("train {pairs} prompts.heldout=null", "prompts.heldout", "None"),
    ("train {pairs} prompts.train={overlap}", "prompts.train", "diffusion_dpo", "spo"),
    ("train {pairs} evaluate.prompts=4", "evaluate.prompts", "4", "1 (the processes) to 3"),
    ("train {pairs} run.dir={run} run.resume=true", "run.resume", "method: 'spo' -> 'diffusion_dpo'"),
    ("train-judge {training}", "{training}", "prompts", "strop train"),
    ("train {judge}", "{judge}", "optim.steps", "strop train-judge"),
    ("plan {judge}", "{judge}", "optim.steps", "strop train-judge"),
    ("train-judge {judge} optim.step=3", "optim.step;", "optim.steps?"),
    ("train-judge {judge} model.path=nowhere", "model.path", "nowhere"),
    ("train-judge {judge} judge.path=nowhere", "judge.path", "nowhere"),
    ("train-judge {judge} judge.dtype=float16", "judge.dtype", "float16", "float32"),
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
    ("train-judge {judge} run.dir={judge_run} run.resume=true judge.path={swapped}", "judge.path", "model.safetensors"),
    ("train-judge {judge} run.dir={judge_run} run.resume=true data.source=a:b", "data.source", "recipe_modules:pairs"),
    ("train-judge {judge} run.dir={judge_run} run.resume=true data.heldout=9", "run.resume", "data.heldout: 20 -> 9"),
    ("train {pairs} data.only={file}", "data.only", "{file}", "recipe_modules:pairs"),
    ("train-judge {judge} data.only={file}", "data.only", "{file}", "recipe_modules:pairs"),
    (f"filter-pairs nowhere {ONE_SCORE}", "SOURCE", "nowhere", "parquet", ".jsonl"),
    (f"filter-pairs recipe_modules:pairs {ONE_SCORE}", "SOURCE", "recipe_modules:pairs", "no code"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --gap clip_score", "--gap", "'clip_score'", "NAME=NUMBER"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --gap clip_score=0,clip_score=1", "--gap", "once"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --gap clip_score=nan", "--gap", "clip_score=nan"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --tie-gap clip_score=-1", "--tie-gap", "-1", "clip_score"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --batch 0", "--batch", "0"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --device tpu", "--device", "'tpu'"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --scorers clip", "--scorers", "'clip'", "clip_score"),
    (f"filter-pairs {{broken}}/pairs.jsonl {ONE_SCORE} --scorers clip_score=nowhere", "--scorers", "nowhere"),
    ("filter-pairs {broken}/pairs.jsonl {new} --scorers clip_score", "--gap", "aesthetic", "clip_score"),
    ("filter-pairs {broken}/pairs.jsonl {new} --scorers aesthetic,clip_score", "--scorers", "aesthetic", "sac+logos"),
    ("filter-pairs {broken}/pairs.jsonl {new} --scorers recipe_modules:examiner", "--gap", "aesthetic", "brightness"),
    ("filter-pairs {broken}/pairs.jsonl {file} --scorers aesthetic=a,clip_score", "OUT", "{file}", "filter-pairs"),
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
    ("plan {training} audit.every=2 audit.path={unet}", "audit.path", "{unet}", "clip"),
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


def png(width, height):
    """A PNG of a few bytes that says how many pixels there would be."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9)))
    parts = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cut_jpeg():
    out = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(out, "JPEG")
    return out.getvalue()[:-500]


def pairs_of(make):
    """A folder of eight pairs, of which one image is the bad one."""

    def write(folder):
        folder.mkdir()
        make(folder / "bad.png") if callable(make) else (folder / "bad.png").write_bytes(make)
        Image.new("RGB", (32, 32)).save(folder / "good.png")
        rows = [{"image_0": "bad.png", "image_1": "good.png", "caption": letter, "label": 0} for letter in "abcdefgh"]
        (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return write


def images_of(make):
    """Two folders of an image each, and its prompt; one image is the bad one."""

    def write(folder):
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True)
            (folder / name / "prompts.txt").write_text("a cat")
            Image.new("RGB", (32, 32)).save(folder / name / "0_0.png")
        (folder / "b" / "0_0.png").unlink()
        make(folder / "b" / "0_0.png") if callable(make) else (folder / "b" / "0_0.png").write_bytes(make)
        row = {"tag": "single_object", "prompt": "a cat", "include": [{"class": "cat", "count": 1}]}
        (folder / "metadata.jsonl").write_text(json.dumps(row))

    return write


def lora_with(**header):
    layer = "unet.mid_block.attentions.0.proj_in.lora"
    tensors = {f"{layer}.down.weight": torch.zeros(2, 3), f"{layer}.up.weight": torch.zeros(3, 2)}
    return lambda path: save_file(tensors, path, metadata={ADAPTER: json.dumps(header)})


def model_with(part, **changes):
    """A copy of the tiny model with another configuration of a part."""

    def write(folder):
        shutil.copytree(TINY["model"], folder)
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


def judge_with_shard(name):
    def write(folder):
        shutil.copytree(TINY["judge"], folder)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": name}}))

    return write


TINY = {}  # the folders that the makers above copy; `places` says where they are
DEEP, DIGITS, HALF = "[" * 100_000, "9" * 5000, "\\ud83d"
TRAIN, PROMPTS = "train {training} model.path={bad}", "train {training} prompts.train={bad}"
PAIRS = "train-judge {judge} data.train=null data.heldout=2 data.max_broken=0 data.source={bad}"
LABELLED = "train {pairs} data.train=null data.max_broken=0 data.source={bad}"
EPS, BOMB, STRIP = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png(60_000, 60_000), png(1, 60_000)
ZERO = lambda path: path.symlink_to("/dev/zero")
STUDY, GENEVAL = "study make {bad}/a {bad}/b --out new", "geneval layout --metadata {bad}/metadata.jsonl --out new"
WHOLE = "model: {path: m}\njudge: {path: j}\nprompts: {train: t}\nrun: {dir: r, iterations: 1}\n"
PAIRLESS = "method: mapo\nmodel: {path: m}\njudge: {path: j}\nrun: {dir: r, iterations: 1}\n"
BAD_FILES = [
    ("a.yaml", "run: {dir: a}\nrun: {dir: b}", "train {bad}", "{bad}", "run twice"),
    ("a.yaml", "optim: {lr: 1e-5, lr: 1e-4}", "plan {bad}", "{bad}", "lr twice"),
    ("a.yaml", WHOLE + "rollout: {k: 1:30}", "train {bad}", "rollout.k", "'1:30'"),
    ("a.yaml", f"{WHOLE}rollout: {{k: {DIGITS}}}", "train {bad}", "rollout.k", "99…"),
    ("a.yaml", f"{WHOLE}rollout: {{k: !!int 0x{DIGITS}}}", "train {bad}", "rollout.k", "many digits"),
    (
        "a.yaml",
        "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        "train {bad}",
        "{bad}",
        "alias *a",
    ),
    ("a.yaml", f"run: {DEEP}", "train {bad}", "{bad}", "20 levels"),
    ("a.yaml", f"{WHOLE}lora: {{rank: {'x' * 5000}}}", "train {bad}", "lora.rank", "xxx…"),
    ("a.yaml", "#" * 2**20, "train {bad}", "{bad}", "1,048,576 bytes"),
    ("a.yaml", b"run: {dir: \xe9}", "train-judge {bad}", "{bad}", "utf-8"),
    ("a.yaml", ZERO, "train {bad}", "{bad}", "a device"),
    ("a.yaml", os.mkfifo, "plan {bad}", "{bad}", "a pipe"),
    ("a.csv", "a cat\na dog\n", PROMPTS, "prompts.train", "{bad}", "a cat"),
    ("a.csv", "id,prompt\n1,a cat, a dog\n", PROMPTS, "{bad}", "line 2"),
    ("a.tsv", "id,prompt\n1,a\n", PROMPTS, "{bad}", "id,prompt"),
    ("a.txt", '[{"caption": "a"},\n{"caption": "b"}]', PROMPTS, "{bad}", ".json"),
    ("a.txt", '{"caption": "a"}\n{"caption": "b"}', PROMPTS, "{bad}", ".jsonl"),
    ("a.txt", "a cat\n".encode("utf-16"), PROMPTS, "{bad}", "UTF-8"),
    ("a.txt", ZERO, PROMPTS, "prompts.train", "a device"),
    ("a.json", os.mkfifo, PROMPTS, "prompts.train", "a pipe"),
    ("a.json", DEEP, PROMPTS, "{bad}", "nested"),
    ("a.json", DIGITS, PROMPTS, "{bad}", "limit"),
    ("a.json", f'["a", "{HALF}"]', PROMPTS, "{bad}", "entry 2", "half"),
    ("a.jsonl", f'{{"prompt": "{HALF} b"}}', PROMPTS, "{bad}", "line 1", "half"),
    ("a.jsonl", f'{{"label": {DIGITS}}}', PAIRS, "line 1", "limit"),
    ("a.jsonl", DEEP, PAIRS, "line 1", "nested"),
    ("a.jsonl", f'{{"image_0": "a", "image_1": "b", "label": 0, "caption": "{HALF}"}}', PAIRS, "line 1", "caption"),
    ("a.jsonl", os.mkfifo, PAIRS, "data.source", "{bad}"),
    ("a.jsonl", "\n", LABELLED, "data.source", "{bad}", "no pair"),
    ("a.jsonl", '{"image_0": "a", "caption": "b", "label": 0}', LABELLED, "data.source", "line 1", "image_1"),
    ("a.jsonl", '{"image_0": "a", "image_1": "b", "caption": "c", "label": "tie"}', LABELLED, "{bad}", "ties"),
    ("a.yaml", PAIRLESS + "prompts: {heldout: h}", "train {bad}", "data is missing"),
    ("a.yaml", PAIRLESS + "data: {source: d}\nprompts: {}", "train {bad}", "prompts.heldout is missing"),
    *[
        ("pairs", pairs_of(make), f"{PAIRS}/p.jsonl", "data.source", "p.jsonl line 1: bad.png", *words)
        for make, *words in (
            (EPS, "no image"),
            (STRIP, "1x60000"),
            (BOMB, "bomb"),
            (png(8000, 8000), "8000x8000"),
            (b"", "empty"),
            (cut_jpeg(), "damaged"),
        )
    ],
    *[
        ("pairs", pairs_of(make), f"{PAIRS}/p.jsonl", "p.jsonl line 1: ", "bad.png", word)
        for make, word in (
            (os.mkfifo, "a pipe"),
            (ZERO, "a device"),
            (Path.mkdir, "directory"),
            (lambda p: 0, "No such"),
        )
    ],
    *[
        ("images", images_of(make), command, "b/0_0.png", word)
        for command in (STUDY, f"{GENEVAL} --images {{bad}}/b")
        for make, word in (
            (EPS, "no image"),
            (STRIP, "1x60000"),
            (BOMB, "bomb"),
            (os.mkfifo, "a pipe"),
            (ZERO, "a device"),
        )
    ],
    ("sd2", model_with("unet/config.json", use_linear_projection=True), TRAIN, "model.path", "a Stable Diffusion 2"),
    ("a.safetensors", os.mkfifo, TRAIN, "model.path", "a pipe"),
    ("a.safetensors", struct.pack("<Q", 2**62) + b"{}", TRAIN, "model.path", "{bad}"),
    *[
        ("judge", judge_with_shard(name), "train {training} judge.path={bad}", "judge.path", "index.json", repr(name))
        for name in (3, None, "../model.safetensors")
    ],
    (
        "a.safetensors",
        lora_with(**{"unet.alpha_pattern": {"(a|aa)+$": 1}}),
        "export {bad} --format kohya --out new",
        "(a|aa)+",
    ),
    ("a.safetensors", lora_with(**{"unet.lora_alpha": "x"}), "export {bad} --format kohya --out new", "alpha", "'x'"),
    ("a.safetensors", os.mkfifo, "export {bad} --format kohya --out new", "{bad}", "a pipe"),
    ("a.safetensors", lora_with(), "evaluate {bad} --out new", "{bad}", "--base"),
]


@pytest.fixture(scope="module")
def places(recipe_folder, training_run, judge_run, recipe_of_method, request, pair_files, tmp_path_factory):
    """The files and folders that the table names; none of them may change."""
    folder = tmp_path_factory.mktemp("places")
    models = ("tiny_folder", "tiny_sdxl_folder", "clip_folder")
    tiny_folder, tiny_sdxl_folder, clip_folder = map(request.getfixturevalue, models)
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
    (folder / "other").write_text("a b c\nd e\ng h\n")
    shutil.copytree(clip_folder, folder / "swapped")
    weights = folder / "swapped" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x3c")
    for name in ("own", "early"):
        (folder / name / "tensorboard").mkdir(parents=True)
        (folder / name / "config.yaml").touch()
    (folder / "own" / "notes.txt").touch()
    (folder / "loras").mkdir()
    for name in "ab":
        shutil.copy(training_run.folder / "lora" / "run_kohya.safetensors", folder / "loras" / f"{name}.safetensors")
    made = ("empty", "overlap", "file", "broken", "replaced", "nameless", "loras", "other", "swapped", "own", "early")
    named = {name: folder / name for name in made}
    named |= {"training": recipe_folder / "training.yaml", "judge": recipe_folder / "judge.yaml"}
    named["pairs"] = Path(recipe_of_method(folder, "diffusion_dpo")[0])
    named |= {"run": training_run.folder, "judge_run": judge_run.folder}
    TINY.update(model=tiny_folder, judge=clip_folder)
    return named | {"model": tiny_folder, "sdxl": tiny_sdxl_folder, "unet": tiny_folder / "unet"}


def contents(places):
    """When each file of the places was last written to, but the lock, which says who has it."""
    files = (file for place in places.values() for file in [place, *place.rglob("*")] if file.name != ".lock")
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def refused(places, tmp_path, monkeypatch, capsys):
    """refused(command, words, **names) checks that a command line gets its sentence, and no memory and no file."""

    def check(command, words, **names):
        monkeypatch.setattr(sys, "argv", ["strop"])
        monkeypatch.chdir(tmp_path)
        before, names = contents(places), {**places, "new": "new", **names}
        arguments = [argument.format(**names) for argument in command.split()]
        if arguments[0] in ("train", "train-judge", "plan"):
            arguments.insert(2, "run.dir=new")
        with bounded_memory(), pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        sentence = capsys.readouterr().err
        assert stopped.value.code == 2, sentence
        assert sentence.startswith("strop: ")
        assert sentence.count("\n") == 1
        assert len(sentence) < 1200
        assert [word for word in (word.format(**names) for word in words) if word not in sentence] == [], sentence
        assert not (tmp_path / "new").exists()
        assert contents(places) == before

    return check


@contextlib.contextmanager
def bounded_memory():
    """Lets a block take MOST_GROWTH more than there is: beyond that allocations fail, and so does the test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    resource.setrlimit(resource.RLIMIT_DATA, (int(pages * os.sysconf("SC_PAGE_SIZE") + MOST_GROWTH), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0])
def test_a_mistake_gets_one_sentence_and_nothing_is_written(row, refused):
    command, *words = row
    refused(command, words)


@pytest.mark.parametrize("row", BAD_FILES, ids=lambda row: f"{row[0]} {row[2].split()[0]} {row[3]}")
def test_a_bad_file_gets_one_sentence_and_nothing_is_written(row, refused, tmp_path):
    name, make, command, *words = row
    bad = tmp_path / name
    if callable(make):
        make(bad)
    else:
        bad.write_bytes(make if isinstance(make, bytes) else make.encode())
    refused(command, words, bad=bad, home=tmp_path)
