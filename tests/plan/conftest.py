"""The configuration that all tests of plan share."""

import pytest

from strop.engine.config.methods.spo import SPOConfig


@pytest.fixture(scope="session")
def make_config():
    """make_config(path, judge, rollout={...}, ...) -> a Config; further keys of a section come in its dict."""

    def make(path="none", judge="none", **sections):
        required = {
            "model": {"path": str(path)} | sections.pop("model", {}),
            "judge": {"path": str(judge)},
            "prompts": {"train": "none"},
            "run": {"dir": "none", "iterations": 1},
        }
        return SPOConfig.model_validate(required | sections)

    return make
