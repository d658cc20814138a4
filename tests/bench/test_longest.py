"""strop.bench.longest: the operations of a call, longest first."""

import pytest
import torch

from strop.bench.longest import SHOWN, longest, table

CPU = torch.device("cpu")


def test_operations_of_a_call():
    a, b = torch.randn(300, 300), torch.randn(300, 300)

    def work(times):
        for _ in range(times):
            (a @ b).relu()

    found = longest(CPU, work, 5)
    calls = {row["name"]: row["calls"] for row in found["longest"]}
    assert calls["aten::mm"] == calls["aten::clamp_min"] == 5
    assert found["longest"][0]["name"] == "aten::mm"  # what aten::matmul calls is not counted to it
    assert sum(row["seconds"] for row in found["longest"]) == pytest.approx(found["seconds"])  # they are few
    assert len(found["longest"]) <= SHOWN


def test_the_table():
    rows = [{"name": "a", "calls": 3, "seconds": 0.75}, {"name": "b", "calls": 10, "seconds": 0.25}]
    lines = table({"seconds": 2.0, "longest": rows}).splitlines()
    assert lines[2:] == ["| a | 3 | 0.75 | 38% |", "| b | 10 | 0.25 | 12% |"]
