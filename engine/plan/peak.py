"""How long a GPU at its peak would take for the work of a run, of which the ledger tells the share that was reached.

By plan's count of the recipe and its list of cards: dense matrix products and convolutions, each on the unit that
does it. Left out are the texts, which a run encodes once. Nothing is timed here.
"""

from __future__ import annotations

import torch

from ..config.training import Config
from .flops import RECOMPUTED, cost
from .gpus import card_called
from .meta_models import Blueprint
from .meter import Flops
from .row_counts import tally
from .unit_costs import Networks, prices

ROLLOUT = ("trunk", "branches", "decode", "judge")
UPDATE = ("update: policy", "update: reference", RECOMPUTED)


def seconds_at_peak(config: Config, family: str, device: torch.device) -> dict[str, float]:
    """Of a prompt's rollout, under `prompts`, and of the update by a pair of it, under `pairs`, on this GPU.

    family: of the base model. Empty on a CPU and for a card that is not in the list. What a pair takes is the mean over
    all that a rollout can make: those that optim.keep_pairs drops are in it, and so are all passes.
    """
    card = card_called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card is None:
        return {}
    blueprint = Blueprint.of(config, family)
    counted = tally(config, blueprint.schedule("cpu"))
    stages = cost(blueprint, counted, prices(blueprint, Networks.of(blueprint))).stages
    rollout, update = (
        card.seconds(sum((stages[name] for name in names if name in stages), Flops()), share=1.0)
        for names in (ROLLOUT, UPDATE)
    )
    return {"prompts": rollout, "pairs": update * counted.prompts / counted.made}
