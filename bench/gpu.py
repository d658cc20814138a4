"""Measures and tests on a GPU what no CPU can show, within nine minutes: `make gpu`, or `python -m strop.bench.gpu`.

The parts run one after the other, the most important first, each in a process of its own and within its own limit; one
that fails or runs out of time takes nothing from the others. What they measure stands in bench/results/<card>/ as soon
as it is known, what they print in a log each, and a table of all parts comes last. Without a GPU every part runs in a
tiny form, so that nothing is met for the first time on the card, and its figures stay in the folder of the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from strop.bench.machine import folder, machine, write
from strop.engine.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parents[1]
LIMIT = 540  # seconds of all parts together
LEAST = 15  # seconds, with less of which no part is begun
PYTEST = "-m pytest -q -p no:cacheprovider --timeout 0 --junitxml {xml}"
TRAIN = "engine/train.py configs/tinyworld.yaml run.dir={logs}/tinyworld"
STEP, SETTINGS, ATTENTION = (f"-m strop.bench.bench_{name}" for name in ("step", "settings", "attention"))
FEW = "rollout.prompts=2 rollout.k=2 rollout.num_steps=4 rollout.t_range=[0,999] optim.micro_batch=2"
SHORT = f"{FEW} evaluate.prompts=4 evaluate.pictures=2 evaluate.num_steps=2 run.iterations=2"


class Part(NamedTuple):
    """Arguments of Python, on a GPU and in the tiny form, and the seconds that they may take.

    {logs}, {results} and {xml} in them stand for the folders of logs and of results and the file of the tests' outcome.
    """

    name: str
    limit: int
    on_gpu: str
    tiny: str


PARTS = (
    Part(
        "kernels", 120, f"{PYTEST} tests/kernels -m 'gpu and not slow'", f"{PYTEST} tests/kernels -k one_place_decides"
    ),
    Part(
        "sd15",
        150,
        f"{STEP} sd15 --rounds 1 --thresholds 0 --no-profile --out {{results}} rollout.prompts=4",
        f"{STEP} tinyworld --rounds 1 --thresholds 0 --no-profile --out {{results}} {FEW}",
    ),
    Part(
        "sdxl",
        200,
        f"{STEP} sdxl_released --rounds 1 --thresholds 0 --no-profile --out {{results}} "
        "rollout.prompts=1 model.gradient_checkpointing=false",
        f"{STEP} tinyworld --rounds 1 --thresholds 0.3 --sides latent_fast --out {{results}} {FEW}",
    ),
    Part(
        "bandwidth",
        90,
        f"{PYTEST} bench/bench_kernels.py --benchmark-only",
        f"{PYTEST} bench/bench_kernels.py --benchmark-only -k 'ddim_branch and reference'",
    ),
    Part(
        "suite",
        60,
        f"{PYTEST} tests -m 'gpu and not slow' --ignore tests/kernels",
        f"{PYTEST} tests/runtime/test_stopwatch.py",
    ),
    Part("attention", 60, f"{ATTENTION} sd15 --out {{results}}", f"{ATTENTION} tinyworld --out {{results}} {FEW}"),
    Part("train", 60, f"{TRAIN} run.iterations=5", f"{TRAIN} {SHORT}"),
    Part(
        "settings",
        150,
        f"{SETTINGS} sd15 --rounds 1 --out {{results}} rollout.prompts=2",
        f"{SETTINGS} tinyworld --rounds 1 --only run.kernels=reference --out {{results}} {FEW}",
    ),
)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Runs all parts, or those that are named, and prints what came of each."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.gpu", description=main.__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of all parts together")
    parser.add_argument("--logs", type=Path, help="folder of what the parts print (default: runs/gpu-TIME)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.parts if name not in names]:
        raise UserError(f"gpu: found {unknown[0]!r}, expected one of {', '.join(names)}")
    logs = args.logs or Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"machine": machine(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    results = folder(record["machine"]) if device.type == "cuda" else logs
    record["parts"] = parts_before(results, record) if args.parts else {}
    end = time.monotonic() + args.limit
    for part in PARTS:
        if part.name in (args.parts or names):
            outcome = run(part, device.type == "cuda", min(part.limit, end - time.monotonic()), logs, results)
            record["parts"][part.name] = outcome
            write(record, "gpu", results)
            print(f"{part.name}: {outcome['outcome']} after {outcome['seconds']:.0f} s", flush=True)
    print(f"\n{table(record)}\n\nresults: {results}\nlogs: {logs}")


def parts_before(results: Path, record: dict) -> dict:
    """Returns what an earlier call found, with the same PyTorch, of the parts that this one may leave out."""
    file = results / "gpu.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    return before["parts"] if record.items() <= before.items() else {}


def run(part: Part, on_gpu: bool, limit: float, logs: Path, results: Path) -> dict:
    """Runs a part for at most `limit` seconds and returns {"outcome", "seconds", and of tests "tests"}."""
    if limit < LEAST:
        return {"outcome": "not begun: no time was left", "seconds": 0.0}
    xml, log, begun = logs / f"{part.name}.xml", logs / f"{part.name}.log", time.monotonic()
    xml.unlink(missing_ok=True)
    words = (part.on_gpu if on_gpu else part.tiny).format(logs=logs, results=results, xml=xml)
    with open(log, "w") as terminal:
        command = [sys.executable, "-X", "faulthandler", *shlex.split(words)]  # at SIGABRT it says where it was
        process = subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=terminal, start_new_session=True)
        try:
            code = process.wait(limit)
            outcome = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped at its limit of {limit:.0f} s"
    counts = {"tests": counted(xml)} if xml.exists() else {}
    return {"outcome": outcome, "seconds": time.monotonic() - begun} | counts


def counted(xml: Path) -> str:
    """Returns how many tests passed, were skipped and failed, and the names of these."""
    cases = list(ElementTree.parse(xml).iter("testcase"))
    of_kind = lambda *kinds: [case.get("name") for case in cases if any(case.find(kind) is not None for kind in kinds)]
    failed, skipped = of_kind("failure", "error"), of_kind("skipped")
    passed = len(cases) - len(failed) - len(skipped)
    return f"{passed} passed, {len(skipped)} skipped, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}"


def table(record: dict) -> str:
    """Returns the record as a table in Markdown."""
    lines = [
        f"{record['machine']}, PyTorch {record['torch']}, CUDA {record['cuda']}",
        "",
        "| part | outcome | seconds | |",
    ]
    lines.append("|---|---|---|---|")
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['outcome']} | {part['seconds']:.0f} | {part.get('tests', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
