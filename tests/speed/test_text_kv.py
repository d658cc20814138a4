"""strop.engine.speed.text_kv: the UNet with its keys and values kept gives what it gives with the text."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

K, PROMPTS = 3, 3  # branches of each, and how many prompts the model's Conditioning has
ROUNDING = 1e-5  # absolute, at outputs of about 1


def branches(k=K):
    x = torch.randn(k * PROMPTS, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.full((len(x),), 501)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("reference", [False, True], ids=["policy", "reference"])
@torch.no_grad()
def test_branches_see_their_own_prompts(model, guided, reference):
    policy, cond = model
    x, t = branches()
    expected = policy.eps(x, t, cond.repeat(K), guided)
    with policy.reference():
        base = policy.eps(x, t, cond.repeat(K), guided)
        with policy.sampling(cond, text_kv=True) as known:
            found_base = policy.eps(x, t, known.repeat(K), guided)
    with policy.sampling(cond, text_kv=True) as known:
        found = policy.eps(x, t, known.repeat(K), guided)
        other = policy.eps(x, t, known[torch.tensor([1, 2, 0])].repeat(K), guided)
    torch.testing.assert_close(
        found_base if reference else found, base if reference else expected, rtol=0, atol=ROUNDING
    )
    assert (expected - base).abs().max() > 100 * ROUNDING  # the LoRA is in the keys and values too
    assert (expected[-1] - other[-1]).abs().max() > 100 * ROUNDING  # and the prompt matters


def test_the_layers_are_as_they_were_afterwards_also_after_an_exception(model):
    policy, cond = model
    x, t = branches(1)
    before, former = policy.eps(x, t, cond), dict(policy.unet.attn_processors)
    with pytest.raises(RuntimeError, match="in between"):
        with policy.sampling(cond, text_kv=True):
            raise RuntimeError("in between")
    assert policy.unet.attn_processors == former
    after = policy.eps(x, t, cond)
    assert torch.equal(before, after)
    assert after.requires_grad


@torch.no_grad()
def test_unprompted_rows_are_the_guided_forwards_other_half(model):
    """With and without text kept, a forward of the empty prompt alone gives what both halves at once give for it."""
    policy, cond = model
    x, t = branches()
    both = policy.eps(x, t, cond.repeat(K))
    with policy.sampling(cond, text_kv=True) as known:
        kept = policy.eps(x, t, known.repeat(K).unprompted(), guided=False)
    plain = policy.eps(x, t, cond.repeat(K).unprompted(), guided=False)
    for found in (kept, plain):
        torch.testing.assert_close(found, both[:1], rtol=0, atol=ROUNDING)
    assert (both[1] - both[0]).abs().max() > 100 * ROUNDING


@torch.no_grad()
def test_what_is_kept_is_of_the_policy_as_it_is(model):
    policy, cond = model
    x, t = branches(1)
    with policy.sampling(cond, text_kv=True):
        pass
    for p in policy.parameters:
        p.mul_(0.5)
    with policy.sampling(cond, text_kv=True) as known:
        found = policy.eps(x, t, known)
    torch.testing.assert_close(found, policy.eps(x, t, cond), rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_no_step_computes_keys_and_values_of_the_text(model):
    """What a step saves is 2 L D C multiplications and additions, and the LoRA's, of every row and cross-attention."""
    policy, cond = model
    x, t = branches(1)
    with FlopCounterMode(display=False) as plain:
        policy.eps(x, t, cond)
    with policy.sampling(cond, text_kv=True) as known, FlopCounterMode(display=False) as kept:
        policy.eps(x, t, known)
    rows, length, width = 2 * len(x), *cond.text.shape[1:]
    layers = [m for name, m in policy.unet.named_modules() if name.endswith(".attn2")]
    each = [2 * (width * m.inner_dim + 4 * (width + m.inner_dim)) * rows * length for m in layers]
    assert plain.get_total_flops() - kept.get_total_flops() == 2 * sum(each)
