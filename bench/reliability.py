"""Kills runs at random moments and around every write, goes on with them, and compares the results bit for bit.

`python -m strop.bench.reliability [--kills 100]` is run from the root of the repository, on Linux. Every run is a short
one of tinyworld in a process of its own, alone or with a second rank; a killed one goes on by `run.resume=auto`, as the
README tells schedulers to. A run is lost if it cannot go on, or if its LoRA, the checkpoint it ends with or its records
differ in one bit from those of a run that nobody killed. `--soak N` runs N iterations and watches memory, open files
and threads. bench/results/reliability.json is written after every kill, and finished kills are not repeated.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from strop.engine import training
from strop.engine.config.find import load
from strop.engine.errors import exit_on_user_error
from strop.engine.runtime import ledger
from strop.engine.runtime.files import write_atomically
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.progress import duration

RESULTS = Path("bench/results/reliability.json")
RECIPE = "configs/tinyworld.yaml"
KEYS = (
    "rollout.num_steps=2",
    "rollout.prompts=5",
    "rollout.k=2",
    "rollout.threshold=0",
    "optim.micro_batch=2",  # five to an iteration, which neither two nor three to a step divide
    "evaluate.prompts=2",
    "evaluate.pictures=2",
    "evaluate.num_steps=2",
    "evaluate.scorers=[]",
    "run.iterations=3",
    "run.save_every=1",
    "run.log_every=2",
    "run.device=cpu",
    "run.share_of_peak=false",
    "run.resume=auto",
)
# What a run spends differs from run to run; everything else in a record is compared.
SPENT = {"seconds", "prompts_per_second", "eta_seconds"} | {column.name for column in ledger.COLUMNS}
PATIENCE = 900  # seconds for a run of seconds: other programs may take the machine


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run: how many ranks it has, and how many micro-batches an optimizer step."""

    ranks: int
    accumulate: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, accumulate {self.accumulate}"


KINDS = [Kind(ranks, accumulate) for ranks in (1, 2) for accumulate in (1, 2, 3)]


class Killer:
    """Kills its own process just before it touches a file below a folder for the `last`-th time; None never kills.

    Python reports to an audit hook what opens, renames and removes files; the writes of libraries in other languages
    lie between two such events.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")

    def __init__(self, folder: Path, last: int | None):
        self.folder, self.last, self.count = str(folder), last, 0

    def __call__(self, event: str, args: tuple) -> None:
        if event not in self.EVENTS or not str(args[0]).startswith(self.folder):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class Run:
    """A run in processes of its own, one a rank, forked from this one, which has imported what they need."""

    def __init__(self, folder: Path, kind: Kind, write: int | None = None, more: Sequence[str] = ()):
        """write: the first rank dies before this write, counted from 0. more: further key=value."""
        self.folder = folder / "run"  # a run's files bear its folder's name
        self.log, self.writes = folder / "log", folder / "writes"
        folder.mkdir(exist_ok=True)
        self.begun = time.monotonic()
        keys = (*KEYS, f"run.dir={self.folder}", f"optim.accumulate={kind.accumulate}", *more)
        port = free_port()
        self.processes = [self._fork(rank, kind.ranks, port, keys, write) for rank in range(kind.ranks)]
        self._codes: dict[int, int] = {}  # of the processes that have ended

    def wait(self, seconds: float) -> list[int] | None:
        """Returns the ranks' exit codes, negative for signals; None when one still runs after so many seconds."""
        end = time.monotonic() + seconds
        while running := [process for process in self.processes if process not in self._codes]:
            for process in running:
                if (done := os.waitpid(process, os.WNOHANG))[0]:
                    self._codes[process] = os.waitstatus_to_exitcode(done[1])
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        return None if running else [self._codes[process] for process in self.processes]

    def kill(self) -> None:
        """Kills the ranks that still run, and waits for them."""
        for process in self.processes:
            if process not in self._codes:
                os.kill(process, signal.SIGKILL)
        self.wait(PATIENCE)

    def said(self) -> str:
        """Returns the end of what the run printed."""
        return self.log.read_text(errors="replace")[-2000:]

    def _fork(self, rank: int, ranks: int, port: int, keys: Sequence[str], write: int | None) -> int:
        process = os.fork()
        if process:
            return process
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if ranks > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            if rank == 0:
                killer = Killer(self.folder, write)
                sys.addaudithook(killer)
            exit_on_user_error(lambda argv: training.run(load(RECIPE, argv)))(keys)
            if rank == 0:
                self.writes.write_text(str(killer.count))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True, slots=True)
class Whole:
    """A run that nobody killed: what it left, how long it took, and how often it wrote."""

    digest: dict[str, str]
    seconds: float
    writes: int


def warm(folder: Path) -> None:
    """Runs once in this process, so that those forked from it have all modules that a run imports on its way.

    Curves are files of one white pixel from here on: to draw them would take half the time of so short a run.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")
    Figure.savefig = lambda self, target, **_: Image.new("RGB", (1, 1), "white").save(target, "PNG")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        training.run(load(RECIPE, (*KEYS, f"run.dir={folder}", "run.iterations=1")))


def whole_run(kind: Kind, folder: Path) -> Whole:
    """Runs to the end. Raises RuntimeError with what the run printed if it does not get there."""
    run = Run(folder, kind)
    codes = run.wait(PATIENCE)
    if codes != [0] * kind.ranks:
        run.kill()
        raise RuntimeError(f"a run that nobody killed ended with {codes}: {run.said()}")
    seconds = time.monotonic() - run.begun
    return Whole(left_by(run.folder), seconds, int(run.writes.read_text()))


def left_by(folder: Path) -> dict[str, str]:
    """Returns digests of what has to be the same: the LoRA, the last checkpoint's tensors, the records."""
    files = [*(folder / "lora").glob("*.safetensors"), *sorted((folder / "checkpoints").glob("*"))[-1].rglob("*")]
    kept = {
        str(path.relative_to(folder)): sha256(tensor_bytes(path)).hexdigest()
        for path in files
        if path.suffix == ".safetensors"
    }
    records = read_records(folder / "metrics.jsonl")
    kept["records"] = json.dumps([{k: v for k, v in record.items() if k not in SPENT} for record in records])
    return kept


def tensor_bytes(path: Path) -> bytes:
    """Returns the bytes of a safetensors file without its header, which names folders."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def kill_and_go_on(kind: Kind, whole: Whole, where: str, chance: random.Random, folder: Path) -> dict:
    """Kills a run, goes on with it, and returns what came of it. where: "write" or "moment"."""
    if where == "write":
        at = chance.randrange(whole.writes)
        run = Run(folder, kind, write=at)
    else:
        at = round(chance.uniform(0.05, 0.95) * whole.seconds, 3)
        run = Run(folder, kind)
        run.wait(at)
    dead = run.wait(0.0 if where == "moment" else PATIENCE / 2)
    if dead is None:
        run.kill()
    before = len(list((run.folder / "checkpoints").glob("[0-9]*")))
    again = Run(folder, kind)
    codes = again.wait(PATIENCE)
    if codes is None:
        again.kill()
    equal = codes == [0] * kind.ranks and left_by(again.folder) == whole.digest
    outcome = {"kind": str(kind), "where": where, "at": at, "checkpoints": before, "equal": equal}
    return outcome if equal else outcome | {"codes": codes, "said": again.said()}


def soak(iterations: int, folder: Path) -> list[dict]:
    """Runs iterations of one rank and returns what the process held every so often: bytes, files, threads."""
    keys = (f"run.iterations={iterations}", "run.log_every=10", "run.save_every=10", "rollout.prompts=1")
    run = Run(folder, KINDS[0], more=keys)
    seen: list[dict] = []
    while run.wait(0.5) is None:
        records = read_records(run.folder / "metrics.jsonl")
        done = records[-1]["iteration"] if records else 0
        if done and (not seen or done - seen[-1]["iteration"] >= iterations // 20):
            seen.append({"iteration": done} | held_by(run.processes[0]))
            print(seen[-1], flush=True)
    return seen


def held_by(process: int) -> dict[str, int]:
    """Returns the resident bytes, open files and threads of a process."""
    place = Path("/proc") / str(process)
    pages = int((place / "statm").read_text().split()[1])
    return {
        "resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir(place / "fd")),
        "threads": len(os.listdir(place / "task")),
    }


def table(outcomes: Sequence[dict]) -> str:
    """Returns a Markdown table: what was tried, how often, and what was lost."""
    lines = [
        "| run | killed | kills | before any checkpoint | resumed bit for bit | lost |",
        "|---|---|---|---|---|---|",
    ]
    words = {"write": "just before a write", "moment": "at a random moment"}
    for kind in map(str, KINDS):
        for where, word in words.items():
            rows = [row for row in outcomes if (row["kind"], row["where"]) == (kind, where)]
            early, equal = sum(row["checkpoints"] == 0 for row in rows), sum(row["equal"] for row in rows)
            if rows:
                lines.append(f"| {kind} | {word} | {len(rows)} | {early} | {equal} | {len(rows) - equal} |")
    equal = sum(row["equal"] for row in outcomes)
    early = sum(row["checkpoints"] == 0 for row in outcomes)
    return "\n".join([*lines, f"| all | | {len(outcomes)} | {early} | {equal} | {len(outcomes) - equal} |"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Kills runs and counts what was lost."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.reliability", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many in all, over ranks and accumulate")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="run N iterations in place of the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file, written after every kill")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = json.loads(args.results.read_text()) if args.results.exists() else {"kills": [], "soak": []}
    with scratch() as folder:
        warm(folder / "warm")
        if args.soak:
            found["soak"] = soak(args.soak, folder / "soak")
            write_atomically(args.results, json.dumps(found, indent=1) + "\n")
            return
        whole: dict[Kind, Whole] = {}
        begun, before = time.monotonic(), len(found["kills"])
        for number in range(len(found["kills"]), args.kills):
            kind = KINDS[number % len(KINDS)]
            if kind not in whole:
                whole[kind] = whole_run(kind, folder / f"whole-{KINDS.index(kind)}")
            where = ("write", "moment")[number // len(KINDS) % 2]
            chance = random.Random(args.seed * 10_000 + number)
            outcome = kill_and_go_on(kind, whole[kind], where, chance, folder / f"{number}")
            found["kills"].append(outcome)
            write_atomically(args.results, json.dumps(found, indent=1) + "\n")
            word = "bit for bit" if outcome["equal"] else f"LOST: {outcome['codes']}, {outcome['said']}"
            pace = (time.monotonic() - begun) / (number + 1 - before)
            eta = duration(pace * (args.kills - number - 1))
            print(f"{number + 1}/{args.kills}  ETA {eta}  {kind}, {where} {outcome['at']}: {word}", flush=True)
            shutil.rmtree(folder / f"{number}")
    print(table(found["kills"]))


if __name__ == "__main__":
    main()
