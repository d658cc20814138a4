"""strop.bench.gpu: what it says of parts that end well, fail, hang or find no time left; and the parts' tiny forms."""

import json

import pytest
import torch

from strop.bench import gpu
from strop.bench.gpu import Part

WRITES = "-c \"open('{xml}', 'w').write('''%s''')\""
XML = "<a><testcase name='x'/><testcase name='y'><skipped/></testcase><testcase name='z'><failure/></testcase></a>"


def part(name, words, limit=100):
    return Part(name, limit, words, words)


@pytest.fixture
def record(monkeypatch, tmp_path):
    """record(parts, limit) -> what the run of these parts wrote."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which pytest-benchmark refuses to measure

    def make(parts, limit=100):
        monkeypatch.setattr(gpu, "PARTS", parts)
        gpu.main(["--logs", str(tmp_path), "--limit", str(limit)])
        return json.loads((tmp_path / "gpu.json").read_text())["parts"]

    return make


def test_a_part_takes_nothing_from_the_others(record, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "LEAST", 1)
    hangs = part("hangs", "-c \"print('begun', flush=True); import time; time.sleep(100)\"", limit=2)
    parts = record([part("fails", "-c 'raise SystemExit(3)'"), hangs, part("counts", WRITES % XML)])
    found = [parts[name]["outcome"] for name in ("fails", "hangs", "counts")]
    assert found == ["failed with exit code 3", "stopped at its limit of 2 s", "done"]
    assert 2 <= parts["hangs"]["seconds"] < 10
    assert (tmp_path / "hangs.log").read_text().startswith("begun\nFatal Python error: Aborted")  # and where
    assert parts["counts"]["tests"] == "1 passed, 1 skipped, 1 failed: z"
    assert "| counts | done |" in capsys.readouterr().out


def test_no_part_is_begun_that_has_no_time(record):
    parts = record([part("first", "-c pass")], limit=gpu.LEAST - 1)
    assert parts["first"] == {"outcome": "not begun: no time was left", "seconds": 0.0}


def test_parts_that_are_not_named_stay_as_they_were(record, tmp_path):
    parts = [part("first", "-c pass"), part("second", "-c 'raise SystemExit(3)'")]
    before = record(parts)
    gpu.main(["second", "--logs", str(tmp_path)])
    now = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (now["first"], now["second"]["outcome"]) == (before["first"], "failed with exit code 3")
    assert record(parts[1:]).keys() == {"second"}  # without names it is a new record


def test_an_unknown_part_lists_the_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["nothing"])
    assert "found 'nothing', expected one of kernels, sd15" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_in_its_tiny_form(record):
    pytest.importorskip("pytest_benchmark")
    assert {name: each["outcome"] for name, each in record(gpu.PARTS, 800).items()} == {
        each.name: "done" for each in gpu.PARTS
    }
