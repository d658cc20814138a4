"""engine/plan/communication.py: bytes between processes, beside what ranks.py really gathers."""

import pytest
import torch

from strop.engine.config.training import Config
from strop.engine.methods.spo.pairs import PreferencePairs, balance
from strop.engine.plan.communication import balance_bytes, zero_bytes
from strop.engine.plan.row_counts import Tally
from strop.engine.runtime import ranks
from strop.engine.runtime.ranks import Ranks


def counted(**given):
    return Tally(prompts=2, **given)


@pytest.mark.parametrize("sides", [1, 2], ids=["x_t shared", "x_t apart"])
def test_the_balance_is_what_is_gathered(monkeypatch, sides):
    received = []

    def all_gather(parts, own):
        if own.numel() > 1:  # not the count
            received.append((len(parts) - 1) * own.nbytes)
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
    shape = (4, 8, 8)
    rows = torch.arange(6)
    pairs = PreferencePairs(torch.zeros(sides, 6, *shape), torch.zeros(2, 6, *shape), rows, rows, rows > 2)
    balance(pairs, 2, Ranks(1, 3, torch.device("cpu")), torch.Generator().manual_seed(0))
    assert sum(received) == balance_bytes(counted(made=6, sides=sides), 4 * 8 * 8, 3)


@pytest.mark.parametrize(
    "stage, passed",
    # 6 micro-batches in 3 optimizer steps: 3 or 6 all-reduces, each twice a gather, and 3 gathers of the parameters
    [(1, 3 * 2 + 3), (2, 6 * 2 + 3)],
)
def test_zero_reduces_at_each_step_or_at_each_micro_batch(stage, passed):
    config = Config.model_validate(
        {
            "model": {"path": "none"},
            "judge": {"path": "none"},
            "prompts": {"train": "none"},
            "optim": {"accumulate": 2},
            "zero": {"stage": stage},
            "run": {"dir": "none", "iterations": 1},
        }
    )
    assert zero_bytes(config, counted(micro_batches=6), lora=1000, ranks=4) == pytest.approx(passed * 0.75 * 4 * 1000)
    assert zero_bytes(config, counted(micro_batches=6), lora=1000, ranks=1) == 0
