"""runtime/stopwatch: stages, their parts, what interrupts them, laps."""

import contextlib
import time

import pytest
import torch

from strop.engine.runtime.stopwatch import Stopwatch


@pytest.fixture
def now(monkeypatch):
    """now[0] is the time of the clock, in seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_stages_parts_and_laps(now):
    clock = Stopwatch("cpu")
    for _ in range(2):
        with clock("rollout"):
            now[0] += 1.0
            with clock("rollout/decode"):
                now[0] += 0.25
    assert clock.lap() == {"rollout": 2.5, "rollout/decode": 0.5}
    with contextlib.suppress(KeyError), clock("update"):
        now[0] += 3.0
        raise KeyError
    assert clock.lap() == {"rollout": 0.0, "rollout/decode": 0.0, "update": 3.0}
    assert clock.seconds() == {"rollout": 2.5, "rollout/decode": 0.5, "update": 3.0}
    assert list(clock.seconds()) == ["rollout", "rollout/decode", "update"]


def test_a_stage_that_is_no_part_of_the_open_one_interrupts_it(now):
    clock = Stopwatch("cpu")
    with clock("update"):
        now[0] += 1.0
        for _ in range(2):
            with clock("show"):
                now[0] += 2.0
            now[0] += 4.0
    assert clock.lap() == {"update": 9.0, "show": 4.0}
    with clock("update"):
        now[0] += 1.0
        with contextlib.suppress(KeyError), clock("show"):
            now[0] += 2.0
            with clock("load"):
                now[0] += 4.0
            raise KeyError
        now[0] += 8.0
    assert clock.lap() == {"update": 9.0, "show": 2.0, "load": 4.0}


def test_parts_side_by_side_share_the_seconds_of_their_stage(now):
    """Whichever asks for the other: the judge calls for branches, which belong to the rollout as it does."""
    clock = Stopwatch("cpu")
    with clock("rollout"):
        now[0] += 1.0
        with clock("rollout/judge"):
            now[0] += 2.0
            with clock("rollout/branches"):
                now[0] += 4.0
            now[0] += 8.0
    assert clock.seconds() == {"rollout": 15.0, "rollout/judge": 10.0, "rollout/branches": 4.0}


@pytest.mark.gpu
def test_it_times_the_device_not_the_launch():
    clock = Stopwatch("cuda")
    begin = time.perf_counter()
    with clock("sleep"):
        torch.cuda._sleep(2_000_000_000)
    launched = time.perf_counter() - begin
    assert clock.seconds()["sleep"] > max(0.2, 5 * launched)
