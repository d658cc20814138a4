"""bench/full_size.py on the golden tiny architectures: what it says of time and noise; full size needs a GPU."""

import json

import pytest
import torch

from strop.bench import full_size
from strop.engine.config.find import load
from strop.engine.models.families.find import family_named

ROOT = full_size.ROOT


@pytest.fixture
def tiny(spm, monkeypatch):
    """tiny(family, dtype) -> the record of a tiny model on the CPU."""
    monkeypatch.chdir(ROOT)

    def measure(family, dtype):
        made = json.loads((ROOT / "tests" / "golden" / "tiny_configs.json").read_text())[family]
        parts = {name: made["ctor"][name] for name in ("unet", "vae")}
        judge = spm.config.to_dict()
        config = load(
            ROOT / "configs" / f"{family}.yaml",
            [f"model.dtype={dtype}", "rollout.num_steps=10", "rollout.prompts=2", "lora.rank=4"],
        )
        architecture = parts | {"scheduler": made["scheduler"], "judge": judge}
        return full_size.measure(config, family_named(family), architecture, torch.device("cpu"))

    return measure


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_in_float32_there_is_no_noise(tiny, family):
    record = tiny(family, "float32")
    assert record["pairs"] == 16
    stages = {"rollout", "rollout/trunk", "rollout/branches", "rollout/decode", "rollout/judge", "update"}
    assert stages == record["seconds"].keys()
    names = ("noise_to_signal", "same_sign", "gradient_cosine")
    assert [record["log_ratio"][name] for name in names] == [0, 1, pytest.approx(1)]


def test_noise_is_larger_in_bfloat16_than_in_float16(tiny):
    noise = {dtype: tiny("sd15", dtype)["log_ratio"] for dtype in ("bfloat16", "float16")}
    assert 0 < 2 * noise["float16"]["noise_to_signal"] < noise["bfloat16"]["noise_to_signal"]
    assert noise["float16"]["gradient_cosine"] > 0.999


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_size_on_a_gpu(family, dtype):
    config = load(ROOT / "configs" / f"{family}.yaml", [f"model.dtype={dtype}"])
    architecture = family_named(family).architecture | {"judge": full_size.JUDGE}
    record = full_size.measure(config, family_named(family), architecture, torch.device("cuda"))
    assert record["pairs"] > 0
    assert record["log_ratio"]["gradient_cosine"] > 0.99
