"""Runs that are killed go on bit for bit, by the command that fills the table of docs/reliability.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strop.bench import reliability

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and /proc is read")


def results_of(tmp_path, *arguments):
    """What the command writes, run in a process of its own: it forks, which a process with threads had better not."""
    command = [sys.executable, "-m", "strop.bench.reliability", "--results", str(tmp_path / "results.json"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((tmp_path / "results.json").read_text())


def test_a_run_killed_before_a_write_goes_on_bit_for_bit(tmp_path):
    said, results = results_of(tmp_path, "--kills", "1", "--seed", "3")
    [kill] = results["kills"]
    assert kill["equal"], kill
    assert "| all | | 1 |" in said
    assert "1/1" in said


@pytest.mark.slow
def test_runs_of_one_and_two_ranks_killed_anywhere_go_on_bit_for_bit(tmp_path):
    _, results = results_of(tmp_path, "--kills", "12")
    assert {kill["kind"] for kill in results["kills"]} == set(map(str, reliability.KINDS))
    assert [kill for kill in results["kills"] if not kill["equal"]] == []


@pytest.mark.slow
def test_a_long_run_holds_what_a_short_one_does(tmp_path):
    _, results = results_of(tmp_path, "--soak", "200")
    seen = results["soak"]
    quarter = len(seen) // 4
    first, last = seen[quarter], seen[-1]
    assert last["iteration"] > 150
    for held in ("open_files", "threads"):  # the fewest: what is being written is open for a moment
        early, late = (min(each[held] for each in part) for part in (seen[:quarter], seen[-quarter:]))
        assert late == early
    assert last["resident_bytes"] < 1.05 * first["resident_bytes"]


def test_a_run_that_differs_in_one_bit_is_lost(tmp_path):
    """What the comparison sees: a bit of a tensor, a number of a record; not a header, nor what was spent."""
    folders = []
    for name in ("whole", "again"):
        folder = tmp_path / name
        (folder / "lora").mkdir(parents=True)
        (folder / "checkpoints" / "000001").mkdir(parents=True)
        header = json.dumps({"__metadata__": {"title": name}}).ljust(64).encode()
        (folder / "lora" / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x01\x02")
        record = {"iteration": 1, "loss": 0.5, "seconds": {"update": len(name)}}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        folders.append(folder)
    whole, again = folders
    assert reliability.left_by(whole) == reliability.left_by(again)
    file = again / "lora" / "lora.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x03")
    assert reliability.left_by(whole) != reliability.left_by(again)
    (whole / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "loss": 0.25}) + "\n")
    assert reliability.left_by(whole)["records"] != reliability.left_by(again)["records"]
