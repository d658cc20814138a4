"""runtime/session: what a run has spent outlives the checkpoint from which it goes on."""

import json
import shutil

import torch

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.run_folder import RunFolder
from strop.engine.runtime.session import Session


def test_seconds_before_a_resumption_count_also_when_its_checkpoint_is_gone(tmp_path, monkeypatch):
    """Only the newest checkpoints of a judge stay, so that the one resumed from goes in the course of the run."""
    resumed = tmp_path / "checkpoints" / "000002"
    resumed.mkdir(parents=True)
    (resumed / "state.json").write_text(json.dumps({"seconds": {"update": 40.0, "total": 60.0}}))
    monkeypatch.setattr(RunFolder, "open", lambda self: setattr(self, "checkpoint", resumed))
    sections = {"model": {"path": "none"}, "judge": {"path": "none"}, "prompts": {"train": "none"}}
    config = SPOConfig.model_validate(sections | {"run": {"dir": str(tmp_path), "iterations": 3}})
    session = Session(config, Ranks(0, 1, torch.device("cpu")))
    session.open()
    shutil.rmtree(resumed)
    seconds = session.seconds()
    assert seconds["update"] == 40.0
    assert 60.0 < seconds["total"] < 120.0
