"""A training in two processes: what becomes of it where its launcher or a rank ends, and on two machines. All slow.

The machines are network namespaces of this one, joined by a cable, which takes root on Linux.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from strop.engine import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TORCHRUN = Path(sys.executable).with_name("torchrun")
KEYS = ("run.iterations=4", "run.save_every=9")


def lora(run):
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def has_record(run):
    file = run / "metrics.jsonl"
    return file.exists() and "\n" in file.read_text()


def rank(started, number):
    """The process of a rank."""
    below = psutil.Process(started.process.pid).children(recursive=True)
    [found] = [p for p in below if p.environ().get("RANK") == str(number)]
    return found


@pytest.fixture(scope="module")
def straight(launch, recipe_folder, tmp_path_factory):
    """The LoRA of a run in two processes that nothing interrupts."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with launch(train.__file__, recipe_folder / "training.yaml", f"run.dir={run}", *KEYS) as started:
        assert started.exit_code() == 0, started.said()[-4000:]
    return lora(run)


def test_ranks_end_with_a_killed_launcher_and_go_on_bit_for_bit(launch, recipe, tmp_path, straight):
    """By torchrun, which starts ranks in its own way."""
    run, keys = tmp_path / "run", recipe(*KEYS)
    with launch(train.__file__, *keys) as started:
        started.until(lambda: has_record(run))
        started.process.kill()
        started.until_alone()
        said = started.said()
    assert "ended by SIGTERM; the checkpoint is " in said
    assert f": deepspeed --num_accelerators 2 --master_port {started.port} {train.__file__} {keys[0]} " in said
    assert not (run / "lora").exists(), "it has ended by itself"
    by = (TORCHRUN, "--nproc_per_node", 2, "--master_port", started.port)
    with launch(train.__file__, *keys, "run.resume=true", by=by) as started:
        assert started.exit_code() == 0, started.said()[-4000:]
    assert same(lora(run), straight)


def test_a_launcher_that_is_told_to_end_lets_the_ranks_save(launch, recipe, tmp_path):
    run = tmp_path / "run"
    with launch(train.__file__, *recipe(*KEYS)) as started:
        started.until(lambda: has_record(run))
        rank(started, 0).parent().terminate()
        assert started.exit_code() != 0
        started.until_alone()
        assert "ended by SIGTERM; the checkpoint is " in started.said()
        assert "Traceback" not in started.said()


@pytest.mark.parametrize(
    "number, sent, said",
    [
        (1, signal.SIGSTOP, "rank 1 of 2 did not answer for 8 s (run.rank_timeout), so the run ends"),
        (0, signal.SIGSTOP, "rank 0 of 2 did not answer for 8 s (run.rank_timeout), so the run ends"),
        (1, signal.SIGKILL, "rank 1 of 2 did not answer any more, so the run ends"),
    ],
    ids=["1 sleeps", "0 sleeps", "1 dies"],
)
def test_a_rank_that_is_gone_is_named(launch, recipe, tmp_path, number, sent, said):
    run = tmp_path / "run"
    with launch(train.__file__, *recipe("run.iterations=99", "run.save_every=1", "run.rank_timeout=8")) as started:
        started.until(lambda: list(run.glob("checkpoints/0*")))
        other = rank(started, 1 - number)
        rank(started, number).send_signal(sent)
        started.until(lambda: said in started.said() or not other.is_running(), 60)
        assert f"{said}; the checkpoint is {run / 'checkpoints'}" in started.said(), started.said()[-4000:]
        psutil.wait_procs([other], 10)
        assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def machines():
    """The words before a command that make it run on one machine and on the other, 10.77.0.1 and 10.77.0.2."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("two machines are two network namespaces, which need Linux, root and iproute2")

    def ip(words, check=True):
        done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
        if done.returncode and check:
            pytest.skip(f"no network namespaces here: ip {words}: {done.stderr.strip()}")

    names = [f"strop-{os.getpid()}-{i}" for i in (1, 2)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add strop1 netns {names[0]} type veth peer name strop1 netns {names[1]}")
        for i, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.77.0.{i}/24 dev strop1")
            ip(f"-n {name} link set strop1 up")
            ip(f"-n {name} link set lo up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            ip(f"netns del {name}", check=False)


@pytest.mark.parametrize("launcher", ["deepspeed --hostfile hosts --no_ssh", "torchrun --nnodes 2 --nproc_per_node 1"])
def test_two_machines_have_the_bits_of_one(launch, recipe, tmp_path, straight, machines, monkeypatch, launcher):
    """As docs/several_machines.md has it: the same line on each machine, but for its number."""
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        started = []
        for number, machine in enumerate(machines):
            where = ("--node_rank", number, "--master_addr", "10.77.0.1", "--master_port", 29500)
            by = (*machine, *launcher.split(), *where)
            run = launch(train.__file__, *recipe(*KEYS), by=by, GLOO_SOCKET_IFNAME="strop1")
            started.append(stack.enter_context(run))
        for one in started:
            assert one.exit_code() == 0, one.said()[-4000:]
    assert same(lora(tmp_path / "run"), straight)
