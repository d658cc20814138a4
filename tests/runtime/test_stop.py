"""Signals: a run ends after its iteration with a checkpoint that goes on bit for bit, any other command at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from strop.engine import train, train_judge
from strop.engine.errors import SIGNALS, Interrupted, exit_on_user_error, interrupt, signals_to
from strop.engine.runtime import stop
from strop.engine.runtime.progress import Progress
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.session import Session
from strop.engine.runtime.stop import Stop

TWO = Ranks(0, 2, torch.device("cpu"))


@pytest.fixture(autouse=True)
def default_handlers():
    """Signals as a terminal leaves them: a job that nohup or a shell began in the background ignores some."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signals_in(monkeypatch):
    """signals_in(2, SIGTERM): this process gets the signals in the second iteration, before it is logged."""

    def arrange(iteration, *numbers):
        log = Session.log

        def send_and_log(self, done, now=False):
            for number in numbers if done == iteration else ():
                os.kill(os.getpid(), number)
            log(self, done, now)

        monkeypatch.setattr(Session, "log", send_and_log)

    return arrange


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize(
    "main, fixture, iteration, weights",
    [
        (train.main, "training_run", 1, "lora/pytorch_lora_weights.safetensors"),
        (train_judge.main, "judge_run", 3, "judge/model.safetensors"),  # where neither record nor checkpoint is due
    ],
    ids=["train", "train-judge"],
)
def test_a_signal_costs_no_iteration(
    request, recipe, tmp_path, signals_in, monkeypatch, capsys, main, fixture, iteration, weights
):
    """Also not where Ctrl-C has ended the `tee` that showed the run's lines."""

    def show(self, record):
        raise BrokenPipeError

    monkeypatch.setattr(Progress, "show", show)
    straight, before = request.getfixturevalue(fixture).folder, handlers()
    keys = recipe(judge=main is train_judge.main)
    signals_in(iteration, signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(keys)
    assert (end.value.code, handlers()) == (143, before)
    monkeypatch.undo()
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("strop: ended")]
    assert f"SIGTERM; the checkpoint is {tmp_path / 'run' / 'checkpoints' / f'{iteration:06d}'}, " in said
    assert said.endswith(" run.resume=true")
    main([*keys, "run.resume=true"])
    whole, parts = load_file(straight / weights), load_file(tmp_path / "run" / weights)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_signal_to_every_process_leaves_the_workers_that_load_pairs(judge_run, recipe, tmp_path, monkeypatch):
    """Launchers and schedulers signal them, too, and the iteration needs what they load."""
    reached, log = [], Session.log

    def signal_workers_and_log(self, done, now=False):
        for worker in psutil.Process().children():
            reached.append(worker.pid)
            worker.terminate()
        log(self, done, now)

    monkeypatch.setattr(Session, "log", signal_workers_and_log)
    train_judge.main(recipe("data.workers=1", judge=True))
    assert reached
    files = (run / "judge" / "model.safetensors" for run in (judge_run.folder, tmp_path / "run"))
    whole, parts = map(load_file, files)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_second_signal_ends_the_run_at_once(recipe, tmp_path, signals_in, capsys):
    signals_in(2, signal.SIGHUP, signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train.main(recipe())
    assert end.value.code == 130
    first = tmp_path / "run" / "checkpoints" / "000001"
    assert f"ended by SIGINT; the checkpoint is {first}, " in capsys.readouterr().err


def test_before_the_first_iteration_a_signal_ends_the_run_at_once(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("strop.engine.training.build", lambda session: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(SystemExit) as end:
        train.main(recipe())
    assert end.value.code == 129
    assert "ended by SIGHUP; " in (said := capsys.readouterr().err)
    assert f"{tmp_path / 'run'} holds no checkpoint" in said
    assert not (tmp_path / "run").exists()


def test_what_a_launcher_repeats_is_no_second_signal(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stop.time, "monotonic", lambda: now)
    waiting = Stop(TWO)
    waiting.waits = True
    with waiting.handled():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        now += stop.ECHO
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminal_that_is_gone_fails_no_print():
    """The other end of a pseudoterminal is closed, as a window is; what is written to it fails from then on."""
    (leader, follower), (told, tell) = os.openpty(), os.pipe()
    if not (child := os.fork()):
        os.dup2(follower, 1)
        os.dup2(follower, 2)
        os.close(leader)
        try:
            os.read(told, 1)
            failed = [stream for stream in (1, 2) if not writable(stream)]
            stop._leave_terminal()
            os._exit(10 * len(failed) + sum(not writable(stream) for stream in (1, 2)))
        finally:
            os._exit(99)
    os.close(follower)
    os.close(leader)
    os.write(tell, b"closed")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 20, "both failed before, none after"


def writable(stream):
    try:
        return os.write(stream, b"a word") > 0
    except OSError:
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_every_command_ends_in_one_sentence(number, code, capsys):
    before = handlers()
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda argv: os.kill(os.getpid(), number))([])
    assert (end.value.code, handlers()) == (code, before)
    assert capsys.readouterr().err == f"strop: ended by {number.name}\n"


def test_what_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_to(interrupt):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize(
    "then, code, said",
    [("", 141, b""), ("os.kill(os.getpid(), 2)", 130, b"strop: ended by SIGINT\n"), ("sys.exit(3)", 3, b"")],
    ids=["end", "Ctrl-C", "exit"],
)
def test_a_closed_pipe_ends_a_command_without_a_word_of_it(then, code, said):
    read, write = os.pipe()
    os.close(read)
    script = "import os, sys; from strop.engine.errors import exit_on_user_error; "
    script += f"exit_on_user_error(lambda argv: [print('plan'), {then}])()"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=buffered, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("module", ["pydantic", "torch"])
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(recipe, tmp_path, module):
    (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, Path(train.__file__), *recipe()]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in done.stderr
