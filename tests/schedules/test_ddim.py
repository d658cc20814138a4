"""schedules/ddim: which numbers go with which step, what is drawn, and how the guidance halves are taken."""

import pytest
import torch

from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_x0_hat


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def coefficients(alphas):
    return DDIMCoefficients.build(alphas, 20, 1.0)


@pytest.fixture
def schedule(coefficients):
    return Schedule(coefficients, 5.0)


def test_steps_and_timesteps(schedule):
    assert schedule.num_steps == 20
    assert schedule.t == (*range(951, 0, -50), 0)
    assert schedule.timesteps(4, 3).tolist() == [751, 751, 751]
    assert schedule.timesteps(20, 2).tolist() == [0, 0]
    assert schedule.timesteps(torch.tensor([0, 19, 4]), 3).tolist() == [951, 1, 751]
    assert schedule.timesteps(4, 1).dtype == torch.int64


def test_the_prior_is_standard_normal_from_its_generator(schedule):
    x = schedule.prior((64, 4, 8, 8), torch.Generator().manual_seed(3))
    assert x.shape == (64, 4, 8, 8)
    assert x.mean().item() == pytest.approx(0, abs=0.03)
    assert x.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(x, schedule.prior((64, 4, 8, 8), torch.Generator().manual_seed(3)))
    assert not torch.equal(x, schedule.prior((64, 4, 8, 8), torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("halves", [1, 2], ids=["unguided", "guided"])
@pytest.mark.parametrize("step", [0, 11, 19, [3, 0, 19]], ids=str)
def test_each_call_is_the_kernel_with_the_numbers_of_its_step(schedule, coefficients, step, halves):
    x, eps = draw(3, 4, 2, 5), draw(halves, 3, 4, 2, 5, seed=1)
    uncond, text = (None, eps[0]) if halves == 1 else eps
    columns = [step] * 3 if isinstance(step, int) else step
    table = coefficients.table[:, columns]
    step = step if isinstance(step, int) else torch.tensor(step)

    assert torch.equal(schedule.x0_hat(x, eps, step), ddim_x0_hat(x, uncond, text, 5.0, table))
    noise = draw(4, 3, 4, 2, 5, seed=7)
    expected, _ = ddim_branch(x, uncond, text, 5.0, table, noise)
    assert torch.equal(schedule.branch(x, eps, step, 4, torch.Generator().manual_seed(7)), expected)
    mean, _ = ddim_branch(x, uncond, text, 5.0, table, torch.zeros(1, 3, 4, 2, 5))
    assert torch.equal(schedule.mean(x, eps, step), mean[0])


def test_branches_are_draws_around_the_mean(schedule, coefficients):
    """Their mean and spread over many draws are those of the step; the branches of a row are not alike."""
    x, eps = draw(2, 1, 2, 2), draw(2, 2, 1, 2, 2, seed=1)
    branches = schedule.branch(x, eps, 10, 20_000, torch.Generator().manual_seed(0))
    sigma = coefficients.table[4, 10]
    torch.testing.assert_close(branches.mean(0), schedule.mean(x, eps, 10), rtol=0, atol=4 * sigma.item() / 20_000**0.5)
    torch.testing.assert_close(branches.std(0), sigma.expand(2, 1, 2, 2), rtol=0.03, atol=0)
    assert not torch.equal(branches[0], branches[1])
    assert schedule.branch(x.bfloat16(), eps, 10, 2, torch.Generator()).dtype == torch.bfloat16


@pytest.mark.parametrize("separate", [1, 2], ids=["shared-x_t", "separate-x_t"])
@pytest.mark.parametrize("halves", [1, 2], ids=["unguided", "guided"])
def test_log_prob_and_log_ratio_are_the_kernels_with_each_rows_step(schedule, coefficients, halves, separate):
    x_prev, x_t = draw(2, 3, 4, 2, 5), draw(separate, 3, 4, 2, 5, seed=1)
    eps = draw(halves, separate, 3, 4, 2, 5, seed=2)
    uncond, text = (None, eps[0]) if halves == 1 else eps
    expected = ddim_log_prob(x_prev, x_t, uncond, text, 5.0, coefficients.table[:, [7, 0, 19]])
    actual = schedule.log_prob(x_prev, x_t, eps, torch.tensor([7, 0, 19]))
    assert actual.shape == (2, 3)
    assert torch.equal(actual, expected)
    wide = [value.double() for value in (x_prev, x_t, eps, draw(*eps.shape, seed=4))]
    step = torch.tensor([7, 0, 19])
    expected = schedule.log_prob(*wide[:3], step) - schedule.log_prob(*wide[:2], wide[3], step)
    torch.testing.assert_close(schedule.log_ratio(*wide, step), expected, rtol=1e-6, atol=1e-9)
