"""methods/judge_training: the learning rate, warm-up and decay."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR

from strop.engine.methods.judge_training.method import learning_rate


def test_learning_rate_warms_up_and_reaches_zero():
    rates = [learning_rate(step, 10, 4, 2.0) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3, 0.0])
    assert learning_rate(0, 5, 0, 2.0) == 2.0


def test_a_logarithmic_warm_up_is_that_of_deepspeed():
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = WarmupDecayLR(torch.optim.SGD([parameter], lr=1.0), 20, warmup_max_lr=2.0, warmup_num_steps=6)
    for step in range(20):
        theirs.step()
        assert learning_rate(step, 20, 6, 2.0, "log") == pytest.approx(theirs.get_last_lr()[0])
