"""plan/gpus: which GPUs are known, seconds at a share of their peak, and shares that were measured."""

import json
from dataclasses import replace

import pytest

from strop.engine.errors import UserError
from strop.engine.plan.gpus import ASSUMED_SHARE, GPUS, find_gpu, gpu_at_share, gpu_of_cuda_name
from strop.engine.plan.meter import Flops


def test_each_unit_takes_its_own_time():
    a100 = find_gpu("A100")
    assert a100.seconds(Flops(half=312e12)) == pytest.approx(1)
    assert replace(a100, share=0.5).seconds(Flops(312e12, 156e12, 19.5e12)) == pytest.approx(6)


def test_no_gpu_does_float32_faster_than_half_precision():
    for each in GPUS.values():
        assert each.half > each.tf32 >= each.float32 > 0
        assert each.memory > 0
        assert each.watts > 0


@pytest.mark.parametrize("key, hint", [("a1000", "did you mean a100"), ("tpu", "expected one of a10, a100")])
def test_an_unknown_gpu_lists_the_known(key, hint):
    with pytest.raises(UserError, match=f"--gpu: found '{key}'") as error:
        find_gpu(key)
    assert hint in str(error.value)


def test_a_measured_share_is_taken_of_the_same_recipe_first(tmp_path):
    write = lambda name, **record: (tmp_path / name).write_text(json.dumps(record))
    share = lambda key, results=tmp_path: gpu_at_share(key, None, "sd15", results).share
    assert share("a100") == ASSUMED_SHARE
    write("a.json", gpu="a100", recipe="sdxl", share_of_peak=0.6)
    write("b.json", gpu="h100", recipe="sd15", share_of_peak=0.7)
    write("c.json", gpu="a100", recipe="sd15")
    write("d.json", gpu={"name": "a100"}, recipe="sd15", share_of_peak=0.8)
    (tmp_path / "e.json").write_text("no JSON")
    assert share("a100") == 0.6
    write("f.json", gpu="a100", recipe="sd15", share_of_peak=0.5)
    assert share("a100") == share("A100") == 0.5
    assert gpu_at_share("a100", None, "sd15", tmp_path).share_source == "measured, f.json"
    assert share("a100", tmp_path / "nowhere") == ASSUMED_SHARE
    given = gpu_at_share("a100", 0.3, "sd15", tmp_path)
    assert (given.share, given.share_source) == (0.3, "given")


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(name, key):
    assert gpu_of_cuda_name(name) is (GPUS[key] if key else None)
