"""strop.bench.bench_attention: the calls of a recipe by hand, and that each backend's time is its own."""

import json

import pytest
import torch

from strop.bench.bench_attention import ROOT, Call, calls, measure, seconds_of, table
from strop.engine.config.find import load

CPU = torch.device("cpu")


def of(found, stage):
    return {(c.heads, c.queries, c.keys, c.width): c.times for c in found if c.stage == stage}


def test_the_calls_of_tinyworld():
    """Blocks with attention: one at 8x8 and one at 4x4 on the way down, the middle, two of each on the way up."""
    found = calls(load(ROOT / "configs" / "tinyworld.yaml"))
    unet = {(4, 64, 64, 16): 3, (4, 64, 16, 16): 3, (4, 16, 16, 24): 2 * 4}  # 16 positions, and texts of 16 tokens
    assert of(found, "branches") == of(found, "update") == unet
    assert of(found, "decode") == {(1, 256, 256, 64): 1}
    assert of(found, "judge") == {(4, 65, 65, 24): 3}
    rows = {c.stage: (c.rows, c.learns, c.dtype) for c in found}
    assert rows["branches"] == (80, False, "float32")
    assert rows["update"] == (80, True, "float32")
    assert rows["decode"] == rows["judge"] == (40, False, "float32")


def test_a_judge_of_latents_calls_its_encoders_and_nothing_is_decoded():
    found = calls(load(ROOT / "configs" / "tinyworld_latent.yaml"))
    assert of(found, "judge") == {(4, 64, 64, 16): 1, (4, 64, 16, 16): 1, (4, 16, 16, 24): 2 * 2}
    assert {c.stage for c in found} == {"branches", "update", "judge"}


@pytest.mark.parametrize("name, heads", [("sd15", {8}), ("sdxl", {10, 20})])
def test_full_size_on_the_meta_device(name, heads):
    found = calls(load(ROOT / "configs" / f"{name}.yaml"))
    assert {c.heads for c in found if c.stage == "branches"} == heads
    attentions = sum(c.times for c in found if c.stage == "branches")
    assert attentions == {"sd15": 2 * 16, "sdxl": 2 * 70}[name]
    assert {c.dtype for c in found if c.stage in ("branches", "update")} == {"float16"}
    assert {c.dtype for c in found if c.stage == "judge"} == {"float32"}


def test_a_backend_without_a_kernel_has_no_time():
    call = Call("update", 2, 2, 8, 4, 16, "float32", True, 1)
    (record,) = measure([call], CPU)
    assert record["seconds"]["auto"] > 0
    assert record["seconds"]["math"] > 0
    assert record["seconds"]["cudnn"] is None
    assert record["rows"] == 2


def test_a_longer_call_takes_longer():
    short, long = (Call("branches", 4, 4, n, n, 32, "float32", False, 1) for n in (16, 512))
    assert seconds_of(long, "math", CPU) > 5 * seconds_of(short, "math", CPU)


def test_the_table_has_the_fastest_in_bold():
    call = {"stage": "judge", "rows": 40, "heads": 4, "queries": 65, "keys": 65, "width": 24, "dtype": "float32"}
    seconds = {"auto": 2e-6, "flash": 3e-6, "cudnn": None, "math": 2.5e-6}
    record = {"recipe": "r", "machine": "m", "torch": "t", "calls": [call | {"times": 3, "seconds": seconds}]}
    last = table(json.loads(json.dumps(record))).splitlines()[-1]
    assert last == "| judge | 3 | 40 x 4 | 65 x 65 x 24 | float32 | 2 | 3 | none | **2** |"
