"""judge/candidates: what a judge does not ask for is not computed, and the trajectory goes on all the same."""

from types import SimpleNamespace

import torch

from strop.engine.config.methods.spo import RolloutConfig
from strop.engine.judge.candidates import Candidates
from strop.engine.methods.spo.rollout import Rollout


def test_a_judge_of_noisy_latents_costs_no_decode_and_no_look_ahead_after_several_steps(policy, diffusion):
    """tests/methods/spo/test_rollout.py has segments of one step."""
    config = RolloutConfig(k=4, num_steps=10, t_range=(0, 701), inner_steps=2, threshold=0)
    rows, judge = [], SimpleNamespace(score=lambda candidates, cond: candidates.x.flatten(2).mean(-1))
    eps = policy.eps
    policy.eps = lambda x, *others: rows.append(len(x)) or eps(x, *others)
    rollout = Rollout(policy, None, judge, diffusion.schedule(10, 1.0, 5.0), config)
    pairs = rollout(diffusion.encode(["a b", "c", "d"]), torch.Generator().manual_seed(0)).pairs
    # of 3 prompts, a forward of the kept latents where the trunk walks or forks; of 4 branches where they walk alone
    assert sorted(rows) == [3] * 6 + [12] * 4
    assert len(pairs) == 3 * 8  # t = 701 to 1
    means = pairs.x_prev.flatten(2).mean(-1)[:, pairs.step == 9]
    assert (means[0] > means[1]).all()


def test_candidates_are_computed_once_and_only_when_asked_for():
    calls = SimpleNamespace(ahead=0, decode=0)

    def look_ahead(prompts):
        calls.ahead += 1
        return torch.zeros(2, 4, 3, 1, 1, 1), torch.ones(4, 3, 1, 1, 1)

    def decode(x0_hat):
        calls.decode += 1
        return 2 * x0_hat

    candidates = Candidates(torch.zeros(4, 3, 1, 1, 1), 751, 801, look_ahead, decode)
    assert candidates.eps is None
    assert torch.equal(candidates.images, torch.full((4, 3, 1, 1, 1), 2.0))
    assert candidates.images is candidates.images
    assert candidates.eps.shape == (2, 4, 3, 1, 1, 1)
    assert (calls.ahead, calls.decode) == (1, 1)
