"""The configuration that all tests of plan share."""

import pytest

from strop.engine.config.find import config_class
from strop.engine.config.offline import OfflineConfig


@pytest.fixture(scope="session")
def make_config():
    """make_config(path, judge, method, rollout={...}, ...) -> a Config; further keys of a section come in its dict.

    judge: its path, or the section.
    """

    def make(path="none", judge="none", method="spo", **sections):
        cls = config_class(method)
        offline = issubclass(cls, OfflineConfig)
        required = {
            "model": {"path": str(path)} | sections.pop("model", {}),
            "judge": judge if isinstance(judge, dict) else {"path": str(judge)},
            "prompts": {"heldout": "none"} if offline else {"train": "none"},
            "run": {"dir": "none", "iterations": 1},
        }
        if offline:
            required["data"] = {"source": "none"} | sections.pop("data", {})
        return cls.model_validate(required | sections)

    return make
