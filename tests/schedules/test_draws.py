"""strop.engine.schedules.draws: what a generator draws, and recorded draws in its place."""

import pytest
import torch

from strop.engine.schedules.draws import Replay, integers, normal

CPU = torch.device("cpu")


def test_a_generator_draws_as_torch_does():
    one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert torch.equal(normal((2, 3), one, CPU, torch.float64), torch.randn(2, 3, generator=two, dtype=torch.float64))
    assert torch.equal(integers(5, 7, one, CPU), torch.randint(0, 5, (7,), generator=two))


def test_recorded_draws_come_in_order_and_in_the_shape_asked_for():
    replay = Replay([torch.arange(6.0), torch.tensor([3, 1]), torch.ones(1, 2)])
    assert normal((3, 2), replay, CPU, torch.float16).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert integers(4, 2, replay, CPU).tolist() == [3, 1]
    assert len(replay) == 1


@pytest.mark.parametrize(
    "recorded, complaint",
    [([], "no recorded draw is left"), ([torch.ones(3)], "asked for"), ([torch.tensor([1, 2])], "asked for")],
    ids=["none-left", "other-size", "other-kind"],
)
def test_a_recording_that_does_not_fit_is_refused(recorded, complaint):
    with pytest.raises(ValueError, match=complaint):
        normal((2,), Replay(recorded), CPU, torch.float32)
