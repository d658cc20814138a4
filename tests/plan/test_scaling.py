"""plan/scaling: bytes between processes, beside what ranks.py really gathers."""

from dataclasses import replace

import pytest
import torch

from strop.engine.methods.spo.pairs import PreferencePairs, balance
from strop.engine.plan.row_counts import RowCounts
from strop.engine.plan.scaling import balance_bytes, zero_bytes
from strop.engine.runtime import ranks
from strop.engine.runtime.ranks import Ranks


@pytest.mark.parametrize("x_t_per_pair", [1, 2])
def test_the_balance_is_what_is_gathered(monkeypatch, x_t_per_pair):
    received = []

    def all_gather(parts, mine):
        if mine.numel() > 1:  # not the count
            received.append((len(parts) - 1) * mine.nbytes)
        for part in parts:
            part.copy_(mine)

    monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
    shape = (4, 8, 8)
    rows = torch.arange(6)
    pairs = PreferencePairs(torch.zeros(x_t_per_pair, 6, *shape), torch.zeros(2, 6, *shape), rows, rows, rows > 2)
    balance(pairs, 2, Ranks(1, 3, torch.device("cpu")), torch.Generator().manual_seed(0))
    counts = RowCounts(2, latents=6 * (x_t_per_pair + 2), other_bytes=6 * (2 * 8 + 1), exchanged=True)
    assert sum(received) == balance_bytes(counts, 4 * 8 * 8, 3)
    assert balance_bytes(replace(counts, exchanged=False), 4 * 8 * 8, 3) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_reduces_at_each_optimizer_step(make_config, stage):
    """6 micro-batches in 3 optimizer steps: 3 all-reduces, each twice a gather, and 3 gathers of the parameters."""
    config, counts = make_config(optim={"accumulate": 2}, zero={"stage": stage}), RowCounts(2, micro_batches=6)
    assert zero_bytes(config, counts, lora=4000, ranks=4) == pytest.approx((3 * 2 + 3) * 0.75 * 4000)
    assert zero_bytes(config, counts, lora=4000, ranks=1) == 0
