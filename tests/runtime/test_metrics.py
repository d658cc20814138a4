"""runtime/metrics: values, valid JSON, resumption, several ranks."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from strop.engine.runtime import metrics
from strop.engine.runtime.columns import GRAD_NORM, PROMPTS, Column
from strop.engine.runtime.metrics import Metrics

MEANS = ("judge", "loss", "margin", "accuracy")
COLUMNS = (
    PROMPTS,
    Column("pairs", "total"),
    *map(Column, MEANS),
    Column("pairs_per_t", "sum", labels=(901, 451, 1)),
    Column("per_t", labels=("a", "b", "c")),
    GRAD_NORM,
)


def new(run_dir, start=0, iterations=10, device="cpu", enabled=True):
    return Metrics(run_dir, device, enabled, COLUMNS, start, iterations)


@pytest.fixture
def fresh(tmp_path):
    return new(tmp_path)


def lines(run_dir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_means_are_weighted_sums_are_summed_totals_run_on(fresh, tmp_path):
    fresh.add({"loss": torch.tensor(0.5), "accuracy": torch.tensor(1.0), "prompts": 8}, weight=3)
    fresh.add({"loss": torch.tensor(0.9), "accuracy": 0.0, "pairs": torch.tensor(13)})
    fresh.add({"pairs_per_t": torch.tensor([2, 0, 5])}, weight=7)  # no mean, so of no account
    fresh.add({"pairs_per_t": torch.tensor([1, 0, 5]), "margin": (0.25, 3), "judge": 2.0})
    fresh.add({"margin": (0.5, torch.tensor(1))}, weight=100)  # it has a weight of its own
    first = fresh.flush(1, optimizer_steps=2, seconds={"rollout": 1.5})
    fresh.add({"loss": 0.7, "pairs_per_t": torch.tensor([0, 0, 4]), "prompts": 8, "pairs": 4})
    second = fresh.flush(2, optimizer_steps=3)

    assert first["loss"] == pytest.approx((3 * 0.5 + 0.9) / 4, rel=1e-7)
    assert (first["accuracy"], first["margin"], first["judge"]) == (0.75, 0.3125, 2.0)
    assert first["pairs_per_t"] == {"901": 3, "451": 0, "1": 10}
    assert (first["prompts"], first["pairs"], first["optimizer_steps"]) == (8, 13, 2)
    assert first["seconds"] == {"rollout": 1.5}
    assert second["loss"] == pytest.approx(0.7)
    assert second["accuracy"] is None
    assert second["pairs_per_t"] == {"901": 0, "451": 0, "1": 4}
    assert (second["prompts"], second["pairs"]) == (16, 17)
    assert lines(tmp_path) == [first, second]


def test_vector_means_keep_each_entry_and_its_weight(fresh):
    fresh.add({"per_t": (torch.tensor([4.0, 8.0, math.nan]), torch.tensor([1.0, 3.0, 0.0]))})
    fresh.add({"per_t": (torch.tensor([2.0, 4.0, math.nan]), torch.tensor([1.0, 1.0, 0.0]))})
    assert fresh.flush(1)["per_t"] == {"a": 3.0, "b": 7.0, "c": None}
    assert fresh.flush(2)["per_t"] is None


def test_an_iteration_without_pairs_is_null_and_valid_json(fresh, tmp_path):
    fresh.add({"loss": torch.tensor(math.nan), "margin": torch.empty(0).mean(), "prompts": 8, "pairs": 0}, weight=0)
    record = fresh.flush(1)
    assert record["loss"] is record["margin"] is record["grad_norm"] is None
    assert record["pairs"] == 0
    assert "nonfinite" not in record
    assert set(lines(tmp_path)[0]) == {*metrics.FIELDS, *(column.name for column in COLUMNS)}


def test_a_loss_that_is_nan_is_null_but_named(fresh, tmp_path):
    fresh.add({"loss": math.nan, "margin": 0.25})
    record = fresh.flush(1, grad_norm=math.inf, seconds={"update": math.nan})
    assert (record["loss"], record["grad_norm"], record["seconds"]) == (None, None, {"update": None})
    assert sorted(record["nonfinite"]) == ["grad_norm", "loss", "seconds"]
    assert lines(tmp_path) == [record]


def test_a_name_needs_a_column_and_a_vector_its_labels(fresh):
    with pytest.raises(ValueError, match=r"'los'.* prompts, pairs, judge, loss"):
        fresh.add({"los": 1.0})
    with pytest.raises(RuntimeError, match="shape"):
        fresh.add({"loss": torch.ones(3)})


def test_sums_do_not_hold_the_graph(fresh):
    weight = torch.ones((), requires_grad=True)
    fresh.add({"loss": weight * 2})
    fresh.add({"loss": weight * 4})
    assert fresh.flush(1)["loss"] == 3.0


def test_resuming_cuts_later_lines_and_goes_on_counting(tmp_path):
    before = new(tmp_path)
    for iteration in (1, 2, 3):
        before.add({"prompts": 10, "loss": float(iteration)})
        before.flush(iteration)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "prompts"')  # killed while writing

    resumed = new(tmp_path, start=2)
    resumed.add({"prompts": 10})
    resumed.flush(3)
    rows = [(record["iteration"], record["prompts"], record["loss"]) for record in lines(tmp_path)]
    assert rows == [(1, 10, 1.0), (2, 20, 2.0), (3, 30, None)]


def test_rewind_drops_what_was_not_flushed(fresh):
    fresh.add({"prompts": 4})
    fresh.flush(1)
    fresh.add({"prompts": 100})
    fresh.rewind(1)
    fresh.add({"prompts": 4})
    assert fresh.flush(2)["prompts"] == 8


def test_pace_counts_prompts_of_the_window(fresh, monkeypatch):
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    fresh.rewind(0)
    fresh.add({"prompts": 8})
    first = fresh.flush(1)
    fresh.add({"prompts": 8})
    fresh.seconds_after_loop = 50.0
    second = fresh.flush(2)
    assert (first["prompts_per_second"], first["eta_seconds"]) == (2.0, 4.0 * 9)
    assert (second["prompts_per_second"], second["eta_seconds"]) == (4.0, 3.0 * 8 + 50)


def two_ranks(rank, run_dir):
    dist.init_process_group("gloo", init_method=f"file://{run_dir}/rendezvous", rank=rank, world_size=2)
    measured = new(run_dir, enabled=rank == 0)
    measured.add({"prompts": 4, "judge": torch.tensor(float(rank))}, weight=1 + 2 * rank)
    if rank == 1:  # rank 0 kept no pair
        measured.add({"loss": 0.5, "pairs_per_t": torch.tensor([1, 2, 0])}, weight=5)
    record = measured.flush(1)
    Path(run_dir, f"rank{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_and_one_writes(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for record in ranks:
        assert (record["prompts"], record["judge"], record["loss"]) == (8, 0.75, 0.5)
        assert record["pairs_per_t"] == {"901": 1, "451": 2, "1": 0}
    assert lines(tmp_path) == [ranks[0]]


@pytest.mark.gpu
def test_adding_never_waits_for_the_device(tmp_path):
    measured = new(tmp_path, device="cuda")
    step = torch.tensor([0, 2, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured.add({"loss": torch.ones((), device="cuda"), "grad_norm": 0.5}, weight=2)
        measured.add({"pairs_per_t": torch.zeros(3, device="cuda").index_add_(0, step, torch.ones(3, device="cuda"))})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    record = measured.flush(1)
    assert (record["loss"], record["grad_norm"], record["pairs_per_t"]) == (1.0, 0.5, {"901": 1, "451": 0, "1": 2})
