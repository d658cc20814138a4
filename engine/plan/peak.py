"""How long a GPU at its peak would take for the work of a run, of which the ledger tells the share that was reached.

By plan's count of the recipe and its list of cards: dense matrix products and convolutions, each on the unit that
does it. Left out are the texts, which a run encodes once. Nothing is timed here. A run that asks has it counted in a
process of its own, for which this file is run: the recipe comes on standard input, the seconds go to standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from ..config.training import Config
from ..models.base_model import quiet_libraries
from ..models.families.base import Family
from ..models.families.find import family_named
from .flops import RECOMPUTED, cost
from .gpus import Card, card_called
from .meta_models import Blueprint
from .meter import Flops
from .row_counts import tally
from .unit_costs import Networks, prices

ROLLOUT = ("trunk", "branches", "decode", "judge")
UPDATE = ("update: policy", "update: reference", RECOMPUTED)


def seconds_at_peak(config: Config, family: Family, device: torch.device) -> dict[str, float]:
    """As seconds_on, of this GPU and counted in another process; waits for it, about half a minute.

    Empty where run.share_of_peak is false, on a CPU and for a card that is not in the list. Raises CalledProcessError
    where the other process fails, which has then said why on the terminal.
    """
    if not config.run.share_of_peak or device.type != "cuda":
        return {}
    gpu = torch.cuda.get_device_name(device)
    if card_called(gpu) is None:
        return {}
    asked = json.dumps({"config": config.model_dump(mode="json"), "family": family.name, "gpu": gpu})
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", __name__]
    found = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, env=without_gpu, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def seconds_on(card: Card, config: Config, family: Family) -> dict[str, float]:
    """Of a prompt's rollout, under `prompts`, and of the update by a pair of it, under `pairs`, on a card at its peak.

    family: of the base model. What a pair takes is the mean over all that a rollout can make: those that
    optim.keep_pairs drops are in it, and so are all passes.
    """
    blueprint = Blueprint.of(config, family)
    counted = tally(config, blueprint.schedule("cpu"))
    stages = cost(blueprint, counted, prices(blueprint, Networks.of(blueprint))).stages
    rollout, update = (
        card.seconds(sum((stages[name] for name in names if name in stages), Flops()), share=1.0)
        for names in (ROLLOUT, UPDATE)
    )
    return {"prompts": rollout, "pairs": update * counted.prompts / counted.made}


def main() -> None:
    """Answers seconds_at_peak of another process, in the last line."""
    asked = json.load(sys.stdin)
    quiet_libraries()
    config = Config.model_validate(asked["config"])
    print(json.dumps(seconds_on(card_called(asked["gpu"]), config, family_named(asked["family"]))))


if __name__ == "__main__":
    main()
