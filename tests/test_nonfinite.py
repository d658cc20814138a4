"""NaN and infinity in the course of a run: left out where there are few, and else the end of it, in one sentence."""

import math

import pytest
import torch
from safetensors.torch import load_file

from strop.engine import train, train_judge
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.judge_training.method import JudgeTraining
from strop.engine.methods.spo.method import SPO
from strop.engine.report.run_folder import make_report
from strop.engine.runtime.metrics import read_records


def sentences(main, arguments, capsys):
    """The exit code of a command, and its lines on stderr."""
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err.splitlines()


def poison(monkeypatch, method, calls, what="loss"):
    """Makes the numbered micro-batches, of all of a run, have a loss or a gradient of NaN."""
    count, loss = iter(range(10**6)), method.loss

    def poisoned(self, batch):
        value, stats = loss(self, batch)
        if next(count) not in calls:
            return value, stats
        if what == "gradient":
            value.register_hook(lambda grad: grad * math.nan)
            return value, stats
        return value * math.nan, dict.fromkeys(stats, torch.tensor(math.nan))

    monkeypatch.setattr(method, "loss", poisoned)


def finite_files(run):
    files = list(run.rglob("*.safetensors"))
    return [file for file in files if any(not v.isfinite().all() for v in load_file(file).values())] == []


def test_a_learning_rate_far_too_large_ends_the_run_and_nothing_of_nan_is_saved(recipe, tmp_path, capsys):
    keys = ("optim.lr=1e20", "optim.max_grad_norm=null", "optim.micro_batch=1")
    code, lines = sentences(train.main, recipe(*keys), capsys)
    assert code == 2
    assert [word for word in ("iteration 1", "the loss", "optim.lr", "no checkpoint") if word not in lines[-1]] == []
    assert all(line.startswith("strop: ") for line in lines)
    assert finite_files(tmp_path / "run")


@pytest.mark.parametrize("judge", [False, True], ids=["policy", "judge"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_second_step_in_a_row_ends_the_run_and_names_the_last_checkpoint(
    recipe, tmp_path, monkeypatch, capsys, judge, what
):
    method, main = (JudgeTraining, train_judge.main) if judge else (SPO, train.main)
    poison(monkeypatch, method, {2, 3}, what)
    code, lines = sentences(main, recipe("run.save_every=1", "run.log_every=1", judge=judge), capsys)
    assert code == 2
    last = "000003" if judge else "000001"  # with an iteration of one micro-batch, or of two
    words = (f"checkpoints/{last}", f"the {what}", "optim.lr", f"iteration {4 if judge else 2}")
    assert [word for word in words if word not in lines[-1]] == []
    assert [what in line for line in lines] == [True, True], "one warning, and the end"
    assert finite_files(tmp_path / "run")
    assert make_report(tmp_path / "run").is_file()


def test_a_micro_batch_left_out_is_counted_and_said_once(recipe, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, SPO, {0, 3, 7})
    code, lines = sentences(train.main, recipe("optim.accumulate=2", "run.iterations=4"), capsys)
    assert (code, len(lines)) == (0, 1)
    assert "1 micro-batches" in lines[0]
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["left_out"] for record in records] == [1, 2, 2, 3]
    assert [record["optimizer_steps"] for record in records] == [1, 2, 3, 4]
    assert all(math.isfinite(record[name]) for record in records for name in ("loss", "margin", "grad_norm"))
    assert "3 micro-batches were left out" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("bad, left", [(0, 2), (slice(None), None)], ids=["one branch", "all"])
def test_scores_of_the_judge_that_are_not_finite(recipe, tmp_path, monkeypatch, capsys, bad, left):
    """Pairs without a score are not trained on; a judge that scores nothing ends the run."""
    score = StepAwarePreferenceModel.score

    def poisoned(self, candidates, cond):
        scores = score(self, candidates, cond).clone()
        scores[:, bad] = torch.tensor([math.nan, math.inf])[:, None] if left is None else math.inf
        return scores

    monkeypatch.setattr(StepAwarePreferenceModel, "score", poisoned)
    code, lines = sentences(train.main, recipe(), capsys)
    if left is None:
        assert (code, len(lines)) == (2, 1)
        assert [word for word in ("iteration 1", "judge's scores", "optim.lr") if word not in lines[0]] == []
        return
    assert code == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["unscored"] for record in records] == [3, 6]  # of 2 prompts and 3 judged steps, those of prompt 0
    assert [record["pairs"] for record in records] == [3, 6]
    assert all(math.isfinite(record["judge"]) for record in records)


def test_a_score_of_the_base_model_that_is_not_finite_ends_the_run_before_it_trains(recipe, tmp_path, capsys):
    code, lines = sentences(train.main, recipe("evaluate.scorers=[recipe_modules:gloomy]"), capsys)
    assert (code, len(lines)) == (2, 1)
    assert [word for word in ("evaluate.scorers", "gloom", "1 of 3", "'h i'") if word not in lines[0]] == []
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "error, method, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU"), "loss", ("2.00 GiB", "update")),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "collect", ("9",)),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_is_one_sentence_with_the_keys_to_turn(recipe, monkeypatch, capsys, error, method, words):
    def full(*_):
        raise error

    monkeypatch.setattr(SPO, method, full)
    code, lines = sentences(train.main, recipe("evaluate.pictures=1"), capsys)
    key = "model.gradient_checkpointing=true" if method == "loss" else "model.unet_rows=64"
    assert (code, len(lines)) == (2, 1)
    assert [word for word in (*words, key, "out of memory", "checkpoint") if word not in lines[0]] == []


def test_a_run_too_short_for_an_optimizer_step_says_so(recipe, tmp_path, monkeypatch, capsys):
    """After the first iteration, where the pairs turned out to be too few, and in its summary and report."""
    batches = SPO.batches
    monkeypatch.setattr(SPO, "batches", lambda self, rows: list(batches(self, rows))[:1])
    code, lines = sentences(train.main, recipe("optim.accumulate=3"), capsys)
    assert (code, len(lines)) == (0, 1)
    assert [word for word in ("optim.accumulate", "3", "1 micro-batches") if word not in lines[0]] == []
    shown = (tmp_path / "run" / "report.html").read_text()
    assert "2 micro-batches, too few for an optimizer step" in shown
    assert "No optimizer step was made" in shown
