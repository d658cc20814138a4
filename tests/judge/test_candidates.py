"""judge/candidates: what a judge does not ask for is not computed, and the trajectory goes on all the same."""

from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.training import RolloutConfig
from strop.engine.judge.candidates import Candidates
from strop.engine.methods.spo.rollout import Rollout

PROMPTS, K = 3, 4


class Brightness:
    """A judge that reads the noisy latents alone."""

    def score(self, candidates, cond):
        return candidates.x.flatten(2).mean(-1)


class Counted:
    """A policy that notes the rows of each forward, and a decoder that notes its calls."""

    def __init__(self, policy):
        self.policy, self.latent_shape, self.rows, self.decoded = policy, policy.latent_shape, [], 0

    def eps(self, x, step_t, cond, guided=True):
        self.rows.append(len(x))
        return self.policy.eps(x, step_t, cond, guided)

    def decode(self, latents):
        self.decoded += 1
        return latents


@pytest.mark.parametrize("inner_steps, walked", [(1, 0), (2, 4)], ids=["spo", "mspo"])
def test_a_judge_of_noisy_latents_costs_no_decode_and_no_look_ahead(policy, diffusion, inner_steps, walked):
    config = RolloutConfig(k=K, num_steps=10, t_range=(0, 701), inner_steps=inner_steps, threshold=0)
    schedule, counted = diffusion.schedule(10, 1.0, 5.0), Counted(policy)
    rollout = Rollout(counted, counted, Brightness(), schedule, config)
    outcome = rollout(diffusion.encode(["a b", "c", "d"]), torch.Generator().manual_seed(0))
    assert counted.decoded == 0
    # one forward of the kept latents at each step where branches fork or the trunk walks; of the k branches only where
    # they walk on alone
    forks = 10 if inner_steps == 1 else 6
    assert sorted(counted.rows) == [PROMPTS] * forks + [PROMPTS * K] * walked
    assert len(outcome.pairs) == PROMPTS * 8  # t = 701 to 1
    means = outcome.pairs.x_prev.flatten(2).mean(-1)
    last = outcome.pairs.step == 9
    assert (means[0, last] > means[1, last]).all()


def test_candidates_are_computed_once_and_only_when_asked_for():
    calls = SimpleNamespace(ahead=0, decode=0)

    def look_ahead():
        calls.ahead += 1
        return torch.zeros(2, 4, 3, 1, 1, 1), torch.ones(4, 3, 1, 1, 1)

    def decode(x0_hat):
        calls.decode += 1
        return 2 * x0_hat

    candidates = Candidates(torch.zeros(4, 3, 1, 1, 1), 751, look_ahead, decode)
    assert candidates.eps is None
    assert torch.equal(candidates.images, torch.full((4, 3, 1, 1, 1), 2.0))
    assert candidates.images is candidates.images
    assert candidates.eps.shape == (2, 4, 3, 1, 1, 1)
    assert (calls.ahead, calls.decode) == (1, 1)
