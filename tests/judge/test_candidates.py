"""judge/candidates: what a judge asks for is computed once, and nothing else is."""

import pytest
import torch

from strop.engine.judge.candidates import Candidates

X = torch.arange(24.0).view(3, 2, 1, 2, 2)  # (K, B, C, H, W)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def candidates(asked):
    """Branches at t = 501, whose x0_hat is half of x and whose images are x0_hat and one more."""

    def look_ahead():
        asked.append("look ahead")
        return X[None], X / 2

    def decode(x0_hat):
        asked.append("decode")
        return x0_hat + 1

    return Candidates(X, 501, look_ahead, decode)


def test_a_judge_of_noisy_latents_costs_nothing(candidates, asked):
    assert torch.equal(candidates.x, X)
    assert (candidates.t, candidates.eps) == (501, None)
    assert asked == []


def test_a_judge_of_predicted_latents_costs_no_decode(candidates, asked):
    assert torch.equal(candidates.x0_hat, X / 2)
    assert torch.equal(candidates.eps[0], X), "what is known by then need not be predicted again"
    assert asked == ["look ahead"]


def test_images_are_decoded_once(candidates, asked):
    for _ in range(2):
        assert torch.equal(candidates.images, X / 2 + 1)
    assert candidates.eps is not None
    assert asked == ["look ahead", "decode"]


def test_clean_candidates_have_no_eps():
    clean = Candidates(X, 0, lambda: (None, X), lambda x: x)
    assert torch.equal(clean.images, X)
    assert clean.eps is None
