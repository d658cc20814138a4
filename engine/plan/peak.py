"""Computes the seconds that a GPU at its peak would take for the work of a run, for the ledger's share of the peak.

They follow from the operations that plan counts and from its list of GPUs, without the texts, which a run encodes once.
A run has them counted by a process of its own: the recipe comes on standard input, the seconds go to standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from ..config.find import config_of
from ..config.training import Config
from ..models.base_model import quiet_libraries
from ..models.families.base import Family
from ..models.families.find import family_named
from .flops import RECOMPUTED, stage_flops
from .gpus import Gpu, gpu_of_cuda_name
from .meta_models import ModelBuilder
from .meter import Flops
from .row_counts import count_rows
from .unit_costs import Costs

UPDATE = ("update: policy", "update: reference", "update: other forwards", RECOMPUTED)


def seconds_at_peak(config: Config, family: Family, device: torch.device) -> dict[str, float]:
    """Returns seconds_on of this device, counted in another process, in a quarter to half a minute.

    The result is empty where run.share_of_peak is false, on a CPU, and for a GPU that GPUS does not have. Raises
    CalledProcessError where the other process fails, which has then said why on the terminal.
    """
    if not config.run.share_of_peak or device.type != "cuda":
        return {}
    cuda_name = torch.cuda.get_device_name(device)
    if gpu_of_cuda_name(cuda_name) is None:
        return {}
    request = json.dumps({"config": config.model_dump(mode="json"), "family": family.name, "gpu": cuda_name})
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", __name__]
    answer = subprocess.run(command, input=request, stdout=subprocess.PIPE, text=True, env=without_gpu, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def seconds_on(gpu: Gpu, config: Config, family: Family) -> dict[str, float]:
    """Returns seconds at the GPU's peak: `prompts` to collect from one prompt, `pairs` for the update by one pair.

    family: of the base model. `pairs` is the time of an iteration's update, all passes included, over the number of
    all pairs that it can collect, those included that optim.keep_pairs drops. Where a run reports no pairs, the update
    is in `prompts`.
    """
    builder = ModelBuilder.of(config, family)
    counts = count_rows(config, builder.schedule("cpu"))
    stages = stage_flops(builder, counts, Costs(builder)).stages
    stages.pop("text", None)
    seconds = lambda parts: gpu.seconds(sum(parts, Flops()))
    update = seconds(stages.pop(name) for name in UPDATE if name in stages)
    collect = seconds(stages.values())
    if not counts.pairs:
        return {"prompts": collect + update}
    return {"prompts": collect, "pairs": update * counts.items / counts.pairs}


def main() -> None:
    """Answers seconds_at_peak of another process in the last line of the output."""
    request = json.load(sys.stdin)
    quiet_libraries()
    config = config_of(request["config"])
    print(json.dumps(seconds_on(gpu_of_cuda_name(request["gpu"]), config, family_named(request["family"]))))


if __name__ == "__main__":
    main()
