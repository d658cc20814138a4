"""Runs that are ended and go on: damaged checkpoints, changed inputs, kills, locks and full disks, in one process."""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.evaluation.monitor import Monitor
from strop.engine.runtime import checkpoint, lock
from strop.engine.runtime.checkpoint import Facts, Training
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.ranks import Ranks
from strop.engine.train import main

ALONE = Ranks(0, 1, torch.device("cpu"))


def refused(arguments, capsys):
    """The one sentence with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    sentence = capsys.readouterr().err
    assert (stopped.value.code, sentence.count("\n")) == (2, 1), sentence
    return sentence


def result(run):
    """All that a finished run is compared by: its LoRA and its records, but for times."""
    lora = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    measured = ("iteration", "optimizer_steps", "prompts", "pairs", "pairs_per_t", "judge", "loss", "grad_norm")
    digest = hashlib.sha256(b"".join(lora[name].numpy().tobytes() for name in sorted(lora))).hexdigest()
    return digest, [[line[name] for name in measured] for line in read_records(run / "metrics.jsonl")]


@pytest.fixture
def copied(training_run, tmp_path):
    """The finished run, copied to where `recipe` runs."""
    return Path(shutil.copytree(training_run.folder, tmp_path / "run"))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-64:] = bytes(byte ^ 255 for byte in content[-64:])
    file.write_bytes(content)


def to_integers(file):
    save_file({name: value.to(torch.int32) for name, value in load_file(file).items()}, file)


def rewritten(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"iteration": 99}))


WEIGHTS, OPTIMIZER, RANK = "pytorch_lora_weights.safetensors", "optimizer-0.safetensors", "rank-0.safetensors"
DAMAGES = [
    *((damage, name) for damage in (cut, flip, Path.unlink) for name in (WEIGHTS, OPTIMIZER, RANK, "state.json")),
    *((damage, "digests.json") for damage in (cut, flip, Path.unlink)),
    *((lambda file: file.write_bytes(b""), name) for name in (OPTIMIZER, "config.yaml", "digests.json")),
    (to_integers, OPTIMIZER),
    (rewritten, "state.json"),
]


def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(recipe, copied, capsys):
    """Before anything is loaded."""
    newest, before = copied / "checkpoints" / "000002", copied / "checkpoints" / "000001"
    for damage, name in DAMAGES:
        content = (newest / name).read_bytes()
        damage(newest / name)
        sentence = refused(recipe("run.resume=true"), capsys)
        assert [w for w in (str(newest), name, str(before), "newest_whole") if w not in sentence] == [], sentence
        (newest / name).write_bytes(content)
    newest.rename(newest.with_name("000007"))
    assert "iteration 2" in refused(recipe("run.resume=true", "run.iterations=9"), capsys)


def test_the_newest_whole_one_goes_on_also_with_its_inputs_at_another_place(
    recipe, copied, training_run, tiny_folder, recipe_folder, tmp_path
):
    """And a second damaged checkpoint, which nobody can be sure of, is moved aside and not deleted."""
    cut(copied / "checkpoints" / "000002" / "digests.json")
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(recipe_folder / "train.txt", tmp_path / "prompts.txt")
    moved = (f"model.path={tmp_path / 'model'}", f"prompts.train={tmp_path / 'prompts.txt'}")
    main(recipe("run.resume=newest_whole", *moved))
    assert result(copied) == result(training_run.folder)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["000001", "000002", "000002.old"]


class Runs:
    """Pickled, a command: `touch` of a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_planted_pickle_does_not_run(recipe, copied, tmp_path, capsys):
    """Even where the digests were made to fit."""
    newest = copied / "checkpoints" / "000002"
    (newest / OPTIMIZER).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    digests = json.loads((newest / "digests.json").read_text())
    digests[OPTIMIZER] = hashlib.sha256((newest / OPTIMIZER).read_bytes()).hexdigest()
    (newest / "digests.json").write_text(json.dumps(digests))
    assert str(newest / OPTIMIZER) in refused(recipe("run.resume=true", "run.iterations=3"), capsys)
    assert not (tmp_path / "ran").exists()


class Numbers:
    """A Trainable and an optimizer of one number."""

    def save(self, folder, iteration=None):
        save_file({"number": torch.ones(1)}, folder / ("weights" if iteration else "optimizer"))


def test_only_what_a_run_wrote_is_removed(tmp_path):
    sections = {"model": {"path": "none"}, "judge": {"path": "none"}, "prompts": {"train": "none"}}
    config = SPOConfig.model_validate(sections | {"run": {"dir": str(tmp_path), "iterations": 3, "keep": 2}})
    write = functools.partial(checkpoint.save, Training(Numbers(), Numbers(), {}), config, ranks=ALONE)
    folder = tmp_path / "checkpoints"
    for iteration in (1, 2, 3, 4):
        write(iteration, facts=Facts({}, {"sums": torch.ones(1)}))
        if iteration == 1:
            shutil.copytree(folder / "000001", folder / "000001-best")
            shutil.copytree(folder / "000001", folder / "000009.bak")
        if iteration == 2:
            (folder / "000002" / "notes.txt").touch()
    (folder / ".000005.draft").mkdir()
    (folder / ".mine.draft").mkdir()
    checkpoint.remove_drafts(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".mine.draft", "000001-best", "000002.old", "000003", "000004", "000009.bak"]
    assert [path.name for path in (folder / "000002.old").iterdir()] == ["notes.txt"]
    assert checkpoint.newest(tmp_path).name == "000004"
    assert not checkpoint.damage(folder / "000004")


@pytest.mark.parametrize(
    "monitored, left", [((), ["000003"]), (("evaluate.every=1",), ["000001", "000003"])], ids=["alone", "with the best"]
)
def test_old_checkpoints_go_but_for_that_of_the_best_evaluation(recipe, tmp_path, monkeypatch, monitored, left):
    monkeypatch.setattr(Monitor, "best", 1)
    main(recipe("run.iterations=3", "run.save_every=1", "run.keep=1", *monitored))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == left


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    sections = {"model": {"path": "none"}, "judge": {"path": "none"}, "prompts": {"train": "none"}}
    config = SPOConfig.model_validate(sections | {"run": {"dir": str(tmp_path), "iterations": 3}})
    final = checkpoint.save(Training(Numbers(), Numbers(), {}), config, 1, ALONE, Facts({}, {}))
    at, draft = done.index("replace"), str(final.with_name(".000001.draft"))
    assert set(done[:at]) == {draft, *(f"{draft}/{path.name}" for path in final.iterdir())}
    assert str(final.parent) in done[at:]


def test_what_no_record_has_yet_is_in_the_checkpoint(recipe, tmp_path):
    """Three iterations to a record, and killed after the second."""
    common = ("run.iterations=3", "run.log_every=3")
    main(recipe(*common))
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(run, whole)
    shutil.rmtree(run / "checkpoints" / "000003")
    (run / "metrics.jsonl").write_text("")
    main(recipe(*common, "run.resume=true"))
    assert result(run) == result(whole)
    assert read_records(run / "metrics.jsonl")[-1]["pairs"] == 18
    seconds = read_records(run / "metrics.jsonl")[-1]["seconds"]
    before = json.loads((run / "checkpoints" / "000002" / "state.json").read_text())["since_record"]
    assert seconds["rollout"] > before["rollout"] > 0


class Killed(BaseException):
    """Ends a run where it stands."""


def test_one_line_begins_a_run_and_goes_on_with_it_whenever_it_was_killed(recipe, training_run, tmp_path, monkeypatch):
    """The line of README.md for schedulers: killed before the first checkpoint, and after it."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "run.dir=runs/mine run.resume=auto" in readme
    line, save, killed_at = recipe("run.resume=auto", "evaluate.every=1"), checkpoint.save, [1, 2]

    def killed(training, config, iteration, *rest):
        if iteration in killed_at:
            killed_at.remove(iteration)
            (tmp_path / "run" / "checkpoints" / f".{iteration:06d}.draft").mkdir(parents=True)
            raise Killed
        return save(training, config, iteration, *rest)

    monkeypatch.setattr(checkpoint, "save", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            main(line)
    main(line)
    assert result(tmp_path / "run") == result(training_run.folder)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["000001", "000002"]


HOLDER = """
import sys, time
from pathlib import Path
from strop.engine.runtime.lock import lock
file = lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""


@contextlib.contextmanager
def holder_of(folder):
    """A process that has the lock of a run folder."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_a_second_run_in_the_folder_of_one_that_goes_on_is_refused(recipe, copied, capsys):
    """And is not once that one was killed."""
    records = (copied / "metrics.jsonl").read_bytes()
    with holder_of(copied) as process:
        for resume in ("true", "auto"):
            assert f"process {process.pid} on " in refused(recipe(f"run.resume={resume}", "run.iterations=3"), capsys)
    assert (copied / "metrics.jsonl").read_bytes() == records
    lock.lock(copied).close()


def test_without_locks_there_is_one_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    lock.lock(tmp_path).close()
    assert capsys.readouterr().err.count("No locks available") == 1


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_run_in_a_sentence_and_with_room_it_goes_on(recipe, training_run, tmp_path, capsys):
    run = tmp_path / "run"
    with largest_file(200):
        assert str(run) in refused(recipe("run.resume=auto", "run.tracker=none"), capsys)
    with largest_file(8000):
        sentence = refused(recipe("run.resume=auto", "run.tracker=none"), capsys)
    assert [
        words for words in (str(run / "checkpoints"), "File too large", "run.resume") if words not in sentence
    ] == []
    main(recipe("run.resume=auto"))
    assert result(run) == result(training_run.folder)
    with safe_open(run / "lora" / WEIGHTS, "pt") as file:
        assert file.metadata()["strop.iteration"] == "2"
