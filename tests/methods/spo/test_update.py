"""methods/spo/update: micro-batches, and each latent through the UNet once, whoever shares it."""

from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.training import OptimConfig
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import micro_batches, predict, update, with_reference


def mspo_pairs(count=8):
    """Pairs of two segments of two steps (4, 5 and 6, 7); those of the first steps share x_t."""
    rng = torch.Generator().manual_seed(0)
    step = torch.arange(count) % 4 + 4
    x_t = torch.randn(2, count, 4, 8, 8, generator=rng)
    x_t[1, step % 2 == 0] = x_t[0, step % 2 == 0]
    x_prev = torch.randn(2, count, 4, 8, 8, generator=rng)
    return PreferencePairs(x_t, x_prev, step, torch.arange(count) % 2)


def test_micro_batches_keep_their_pairs_and_put_the_sharing_ones_first():
    pairs = mspo_pairs()
    batches = list(micro_batches(pairs, 3, forks={4, 6}))
    assert [batch.step.tolist() for batch, _ in batches] == [[4, 6, 5], [4, 7, 5], [6, 7]]
    assert [shared for _, shared in batches] == [2, 1, 1]
    for batch, shared in batches:
        assert torch.equal(batch.x_t[0, :shared], batch.x_t[1, :shared])
    together = PreferencePairs.cat([batch for batch, _ in batches])
    assert sorted(together.x_prev[:, :, 0, 0, 0].flatten().tolist()) == sorted(
        pairs.x_prev[:, :, 0, 0, 0].flatten().tolist()
    )


def test_pairs_of_single_steps_keep_their_order_and_share_all():
    pairs = mspo_pairs()
    single = PreferencePairs(pairs.x_t[:1], pairs.x_prev, pairs.step, pairs.prompt)
    batches = list(micro_batches(single, 5, forks={4, 5, 6, 7}))
    assert [shared for _, shared in batches] == [5, 3]
    assert torch.equal(torch.cat([batch.step for batch, _ in batches]), pairs.step)


def test_no_pairs_give_no_micro_batch():
    assert list(micro_batches(mspo_pairs()[:0], 4, forks={4})) == []


@pytest.mark.parametrize("guided, halves", [(True, 2), (False, 1)], ids=["guided", "unguided"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_latent_is_seen_once_and_every_pair_gets_its_own_prediction(policy, diffusion, count, guided, halves):
    """Against one forward for the winners and one for the losers, as published implementations run it."""
    cond, schedule, seen = diffusion.encode(["a b", "c"]), diffusion.schedule(20, 1.0, 5.0), []

    def counted(x, t, cond, guided):
        seen.append(len(x))
        return type(policy).eps(policy, x, t, cond, guided)

    policy.eps = counted
    for batch, shared in micro_batches(mspo_pairs(), count, forks={4, 6}):
        found = predict(policy, batch, shared, schedule, cond, guided)
        assert seen.pop() == 2 * len(batch) - shared
        assert found.shape == (halves, 2, len(batch), 4, 8, 8)
        for side in range(2):
            t = schedule.timesteps(batch.step, len(batch))
            expected = type(policy).eps(policy, batch.x_t[side], t, cond[batch.prompt], guided)
            torch.testing.assert_close(found[:, side], expected, rtol=0, atol=2e-6)


def test_an_unguided_update_of_a_guided_rollout_takes_the_prompts_prediction_alone(policy, diffusion):
    cond, pairs = diffusion.encode(["a b", "c"]), mspo_pairs()
    guided, unguided = diffusion.schedule(20, 1.0, 5.0), diffusion.schedule(20, 1.0, 1.0)
    with torch.no_grad():
        eps = predict(policy, pairs, 0, guided, cond, guided=False)
    moved = eps + 0.1 * torch.randn(eps.shape, generator=torch.Generator().manual_seed(1))
    found = guided.log_ratio(pairs.x_prev, pairs.x_t, moved, eps, pairs.step)
    assert torch.equal(found, unguided.log_ratio(pairs.x_prev, pairs.x_t, moved, eps, pairs.step))


@pytest.mark.parametrize("r", [1, 2], ids=["spo", "mspo"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_pairs_with_their_reference_train_the_same_bits(policy, diffusion, r, guided):
    """In the first pass; and in a later one, shuffled, the reference is still that of each pair."""
    cond, schedule = diffusion.encode(["a b", "c"]), diffusion.schedule(20, 1.0, 5.0)
    pairs, config, forks = mspo_pairs(), OptimConfig(micro_batch=3, guided=guided), {4, 6}
    pairs = PreferencePairs(pairs.x_t[:r], pairs.x_prev, pairs.step, pairs.prompt)
    rng = torch.Generator().manual_seed(2)
    for parameter in policy.parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=rng))

    def gradients(pairs):
        found = []
        for batch, shared in micro_batches(pairs, config.micro_batch, forks):
            optimizer = SimpleNamespace(backward=lambda loss: loss.backward(), step=lambda: None)
            metrics = SimpleNamespace(add_mean=lambda *args, **stats: None)
            update(batch, shared, cond, policy, schedule, optimizer, config, metrics)
            found += [p.grad for p in policy.parameters]
            for p in policy.parameters:
                p.grad = None
        return found

    kept = with_reference(pairs, forks, cond, policy, schedule, config)
    assert kept.eps_ref.shape == (2 if guided else 1, r, 8, 4, 8, 8)
    for one, other in zip(gradients(pairs), gradients(kept), strict=True):
        assert one.any()
        assert torch.equal(one, other)
    again = kept.shuffle(rng)
    assert not torch.equal(again.step, kept.step)
    fresh = PreferencePairs(again.x_t, again.x_prev, again.step, again.prompt)
    with policy.reference():
        for batch, shared in micro_batches(fresh, 8, forks):
            expected = predict(policy, batch, shared, schedule, cond, guided)
    ((batch, _),) = micro_batches(again, 8, forks)
    torch.testing.assert_close(batch.eps_ref, expected, rtol=0, atol=2e-6)


def test_no_pairs_have_no_reference(policy, diffusion):
    cond, schedule = diffusion.encode(["a b", "c"]), diffusion.schedule(20, 1.0, 5.0)
    assert len(with_reference(mspo_pairs()[:0], {4}, cond, policy, schedule, OptimConfig())) == 0
