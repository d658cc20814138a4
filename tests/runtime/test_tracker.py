"""runtime/tracker: what TensorBoard and Weights & Biases get of a record, also after a resumption."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from strop.engine.errors import UserError
from strop.engine.runtime import tracker
from strop.engine.runtime.tracker import check_tracker, open_tracker

RECORD = {"loss": 0.5, "kl": None, "seconds": {"rollout": 1.5, "update": None}, "nonfinite": ["kl"]}
SHOWN = {"train/loss": 0.5, "seconds/rollout": 1.5}


def write_records(kind, run_dir, start, end):
    board = open_tracker(kind, run_dir, start, {"run": {"seed": 1}})
    for iteration in range(start + 1, end + 1):
        board.write(RECORD | {"iteration": iteration})
    board.close()


def test_tensorboard_shows_each_scalar_once(tmp_path):
    write_records("tensorboard", tmp_path, 0, 3)
    write_records("tensorboard", tmp_path, 2, 4)  # resumed from a checkpoint after iteration 2
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == set(SHOWN)
    for tag, value in SHOWN.items():
        assert [(point.step, point.value) for point in board.Scalars(tag)] == [(i, value) for i in (1, 2, 3, 4)]


class WandB:
    """What strop calls of the package wandb, recorded."""

    Error, Run, Settings = RuntimeError, object, dict

    def __init__(self, login, reachable):
        self.begun, self.logged = [], []
        self._login, self._reachable = login, reachable

    def login(self, prompt):
        assert not prompt, "nobody is there to answer"
        return self._login

    def init(self, mode, **settings):
        if mode != "offline" and not self._reachable:
            raise RuntimeError("no\nserver")
        self.begun.append(settings | {"mode": mode})
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=self.logged.append, finish=lambda: None)


@pytest.mark.parametrize(
    "login, reachable, environment, mode, said",
    [
        (True, True, None, None, ""),
        (False, True, None, "offline", "no login"),
        (True, False, None, "offline", "no server"),
        (False, True, "disabled", None, ""),
    ],
)
def test_wandb_stays_on_disk_where_it_cannot_send(
    login, reachable, environment, mode, said, tmp_path, monkeypatch, capsys
):
    wandb = WandB(login, reachable)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    write_records("wandb", tmp_path, 0, 1)
    write_records("wandb", tmp_path, 1, 2)
    first, second = wandb.begun
    assert first["mode"] == second["mode"] == mode
    assert first["id"] == second["id"], "a resumed run goes on in the same one"
    assert (first["name"], first["project"], first["config"]) == (tmp_path.name, "strop", {"run": {"seed": 1}})
    assert wandb.logged == [SHOWN | {"iteration": 1}, SHOWN | {"iteration": 2}]
    warning = capsys.readouterr().err
    assert said in warning
    assert bool(said) == ("wandb sync" in warning)


def test_wandb_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda package: None)
    check_tracker("tensorboard")
    with pytest.raises(UserError, match=r"run\.tracker.*strop\[wandb\]"):
        check_tracker("wandb")


def test_none_shows_nothing(tmp_path):
    assert open_tracker("none", tmp_path, 0, {}) is None


@pytest.mark.slow
def test_the_real_wandb_writes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra strop[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_records("wandb", tmp_path, 0, 2)
    [run] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"train/loss" in run.read_bytes()
