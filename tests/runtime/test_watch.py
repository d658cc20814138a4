"""Ranks that lose their launcher or one another: in one process; test_two_processes.py has them for real."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.distributed import HashStore

from strop.engine.errors import interrupt, signals_to
from strop.engine.runtime import launchers, watch
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.watch import Watch


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def quick(monkeypatch):
    """A watch that beats every hundredth of a second, and whose end of the process is in `ended`."""
    ended = []
    monkeypatch.setattr(watch, "BEAT", 0.01)
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    monkeypatch.setattr(watch, "launchers", lambda: [])
    return ended


def rank(number, store, size=3):
    return Ranks(number, size, torch.device("cpu"), store)


def until(condition):
    late = time.monotonic() + 5
    while not condition() and time.monotonic() < late:
        time.sleep(0.01)


def test_the_rank_that_is_silent_is_named_by_the_first_that_is_not(quick, capsys):
    store, said = HashStore(), set()

    def heard():
        said.update(capsys.readouterr().err.splitlines())
        return said

    with Watch(rank(0, store), 600), Watch(rank(2, store), 1.5), Watch(rank(0, store), 1.5, lambda: "begin anew"):
        until(lambda: heard() and len(quick) > 1)  # the two that wait are not at it at the same time
    assert set(quick) == {1}
    assert said == {"strop: rank 1 of 3 did not answer for 1.5 s (run.rank_timeout), so the run ends; begin anew"}


def test_where_the_store_is_gone_rank_0_is(quick, capsys):
    class Gone:
        def clone(self):
            return self

        def add(self, *_):
            raise RuntimeError("Broken pipe")

        set = add

    with Watch(rank(1, Gone()), 0.2):
        until(lambda: quick)
    assert "rank 0 of 3 did not answer" in capsys.readouterr().err


def fail_to_exchange(mine):
    with pytest.raises(RuntimeError), Watch(mine, 600):
        raise RuntimeError("Connection closed by peer")


def test_a_failed_exchange_is_put_down_to_who_is_silent(quick, capsys):
    """Where all are there, the error stands as it is. The launcher's SIGTERM after a death does not matter."""
    store = HashStore()
    with Watch(rank(1, store, 2), 600):
        fail_to_exchange(rank(0, store, 2))
    assert quick == []
    with signals_to(interrupt):
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
        fail_to_exchange(rank(0, HashStore(), 2))
    assert quick == [1]
    assert "rank 1 of 2 did not answer any more" in capsys.readouterr().err


def test_a_rank_that_has_left_in_peace_is_not_silent(quick):
    store = HashStore()
    with Watch(rank(0, store, 2), 600):
        pass
    with Watch(rank(1, store, 2), 0.2):
        time.sleep(0.4)
    assert quick == []


def test_a_job_that_was_suspended_goes_on(quick, monkeypatch):
    """SIGSTOP and SIGCONT to all ranks: by the clock, each has then not heard of the others for long."""
    store, clock, slept = HashStore(), time.monotonic, 0
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock() + slept)
    with Watch(rank(0, store, 2), 600), Watch(rank(1, store, 2), 600):
        time.sleep(0.1)
        slept = 3600
        time.sleep(0.3)
    assert quick == []


def test_a_launcher_that_is_gone_is_a_sigterm(quick, monkeypatch):
    came = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        above = iter([["launch", "deepspeed"], ["launch", "deepspeed"], ["launch"]])
        monkeypatch.setattr(watch, "launchers", lambda: next(above, []))
        with Watch(rank(0, HashStore(), 1), 600):
            until(lambda: came)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert came == [signal.SIGTERM]


ASK = "from strop.engine.runtime import launchers as l; print(len(l.launchers()), l.command(), flush=True)"


@pytest.mark.parametrize(
    "chain, said",
    [
        ("{python} ask.py run.dir=a\\ b", "0 {python} ask.py 'run.dir=a b'"),
        ("{python} torchrun --nnodes 2 ask.py", "1 {python} torchrun --nnodes 2 ask.py"),
        ("{python} deepspeed {python} -m deepspeed.launcher.launch ask.py", None),
        ("{shell} '{python} torchrun ask.py; true' torchrun-wrapper", "1 {python} torchrun ask.py"),
    ],
)
def test_launchers_are_known_by_their_names(tmp_path, chain, said):
    """And the command is the outermost one's, as it was typed; a shell that mentions a launcher is none."""
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[-1:]])"
    for name, script in (("ask.py", ASK), ("torchrun", start)):
        (tmp_path / name).write_text(script)
    (tmp_path / "deepspeed").write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
    package = tmp_path / "deepspeed.launcher.launch"
    package.write_text(start)
    words = {"python": sys.executable, "shell": "sh -c"}
    typed = chain.format(**words).replace("-m ", "")
    done = subprocess.run(shlex.split(typed), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (said or f"2 {typed}").format(**words)


@pytest.mark.parametrize(
    "words, typed",
    [
        (["python", "-m", "strop.engine.train", "a b.yaml"], "python -m strop.engine.train 'a b.yaml'"),
        (["/env/bin/python", "/env/bin/strop", "train", "r.yaml"], "strop train r.yaml"),
    ],
)
def test_the_command_is_what_one_would_type(monkeypatch, words, typed):
    monkeypatch.setattr(launchers, "launchers", lambda: [])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert launchers.command() == typed
