"""methods/spo/audit: Kendall's tau by hand, and what an audit computes, and leaves as it is, of a rollout."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.methods.spo import RolloutConfig
from strop.engine.methods.spo.audit import Audit, kendall_tau
from strop.engine.methods.spo.rollout import Rollout

NAN = float("nan")
INF = float("inf")
TAUS = [  # scores of four branches by judge and auditor, concordant and discordant pairs, and pairs not tied by either
    ([1, 2, 3, 4], [10, 20, 30, 40], 6 - 0, 6 * 6),
    ([1, 2, 3, 4], [4, 3, 2, 1], 0 - 6, 6 * 6),
    ([1, 2, 3, 4], [1, 2, 4, 3], 5 - 1, 6 * 6),
    ([1, 2, 2, 3], [1, 3, 2, 2], 3 - 1, 5 * 5),
    ([1, 1, 1, 2], [5, 6, 7, 7], 2 - 0, 3 * 5),
    ([1, 1, 1, 1], [1, 2, 3, 4], NAN, 1),
    ([1, 2, 3, NAN], [1, 2, 3, 4], NAN, 1),
    ([1, 2, INF, INF], [1, 2, 3, 4], NAN, 1),
]


def test_kendalls_tau_with_ties():
    judge, auditor = (torch.tensor([row[side] for row in TAUS]).T for side in (0, 1))  # (K, B)
    expected = [difference / untied**0.5 for *_, difference, untied in TAUS]
    assert kendall_tau(judge, auditor).tolist() == pytest.approx(expected, nan_ok=True)
    assert kendall_tau(auditor, judge).tolist() == pytest.approx(expected, nan_ok=True)


def test_forks_without_a_tau_do_not_count():
    audit = Audit(None, None, 2, taus=[torch.tensor([0.5, NAN]), torch.tensor([0.0, 1.0])])
    mean, weight = audit.agreement()
    assert (mean.item(), weight.item()) == (0.5, 3)


LATENT = SimpleNamespace(score=lambda candidates, cond: candidates.x.flatten(2).mean(-1))
PIXEL = SimpleNamespace(score=lambda candidates, cond: candidates.images.flatten(2).mean(-1) * cond.judge)
JUDGES = {"latent": LATENT, "pixel": PIXEL}


@pytest.fixture
def rolled(policy, diffusion):
    """rolled(judge, audited=2, **keys) -> a rollout of three prompts, its audit, and rows of each forward and decode.

    The auditor is PIXEL; None for `audited` is no audit.
    """

    def roll(name, audited=2, **keys):
        config = RolloutConfig(k=4, num_steps=10, t_range=(0, 501), threshold=0, **keys)
        rows, decoded, eps = [], [], type(policy).eps
        policy.eps = lambda x, *others: rows.append(len(x)) or eps(policy, x, *others)
        decoder = SimpleNamespace(decode=lambda x: decoded.append(x.shape[0] * x.shape[1]) or diffusion.decode(x))
        audit = audited and Audit(JUDGES[name], PIXEL, audited)
        rollout = Rollout(policy, decoder, audit or JUDGES[name], diffusion.schedule(10, 1.0, 5.0), config)
        cond = diffusion.encode(["a b", "c", "d"])
        features = {"judge": torch.tensor([1.0, -1.0, 2.0]), "auditor": torch.tensor([1.0, 1.0, 1.0])}
        for field, values in features.items():
            object.__setattr__(cond, field, values)
        outcome = rollout(cond, torch.Generator().manual_seed(0))
        return SimpleNamespace(outcome=outcome, audit=audit, rows=rows, decoded=decoded)

    return roll


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("keys", [{}, {"inner_steps": 2}, {"look_ahead": "text"}], ids=["spo", "mspo", "text"])
def test_an_audit_leaves_the_rollout_as_it_is(rolled, judge, keys):
    plain, audited = rolled(judge, None, **keys), rolled(judge, **keys)
    for name in ("x_t", "x_prev", "step", "prompt"):
        assert torch.equal(getattr(plain.outcome.pairs, name), getattr(audited.outcome.pairs, name)), name
    assert torch.equal(plain.outcome.gaps, audited.outcome.gaps)
    assert len(audited.outcome.pairs) == 3 * 6  # of the six steps from t = 501


@pytest.mark.parametrize("judge, forwards, decodes", [("pixel", [], []), ("latent", [4 * 2] * 5, [4 * 2] * 6)])
def test_an_audit_looks_at_its_prompts_alone_and_at_nothing_twice(rolled, judge, forwards, decodes):
    """Beyond what the judge asks for: a look ahead at each of the six forks but the last, and six decodes."""
    plain, audited = rolled(judge, None), rolled(judge)
    extra = lambda name: sorted((Counter(getattr(audited, name)) - Counter(getattr(plain, name))).elements())
    assert (extra("rows"), extra("decoded")) == (forwards, decodes)
    assert len(audited.decoded) == 6


def test_the_auditor_sees_what_a_judge_would_see(rolled):
    """The judge turns its scores round by the second prompt's feature; the images are the same whoever asked."""
    itself, latent = rolled("pixel").audit, rolled("latent").audit
    assert torch.stack(itself.taus).tolist() == [[1.0, -1.0]] * 6
    assert itself.agreement()[0].item() == 0
    for tau in latent.taus[0].tolist():
        assert -1 <= tau <= 1
