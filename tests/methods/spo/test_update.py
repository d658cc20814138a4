"""methods/spo/update: micro-batches, and each latent through the UNet once, whoever shares it."""

from dataclasses import replace

import pytest
import torch

from strop.engine.config.methods.spo import SPOOptimConfig
from strop.engine.methods.spo.loss import spo_loss
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch, micro_batches


def mspo_pairs(count=8):
    """Pairs of two segments of two steps (4, 5 and 6, 7); those of the first steps share x_t."""
    rng = torch.Generator().manual_seed(0)
    step = torch.arange(count) % 4 + 4
    x_t = torch.randn(2, count, 4, 8, 8, generator=rng)
    x_t[1, step % 2 == 0] = x_t[0, step % 2 == 0]
    x_prev = torch.randn(2, count, 4, 8, 8, generator=rng)
    return PreferencePairs(x_t, x_prev, step, torch.arange(count) % 2, step % 2 == 0)


def spo_pairs():
    """Of single steps: all share x_t."""
    pairs = mspo_pairs()
    return replace(pairs, x_t=pairs.x_t[:1], shared=torch.full_like(pairs.shared, True))


@pytest.fixture
def cond(diffusion):
    return diffusion.encode(["a b", "c"])


@pytest.fixture
def learner(policy, diffusion):
    """learner(keys of section optim) -> one of the fresh policy, guided in the rollout."""
    return lambda **keys: Learner(policy, diffusion.schedule(20, 1.0, 5.0), SPOOptimConfig(**keys))


def test_micro_batches_keep_their_pairs_and_put_the_sharing_ones_first(cond):
    pairs = mspo_pairs()
    batches = list(micro_batches(pairs, 3, cond))
    assert [batch.pairs.step.tolist() for batch in batches] == [[4, 6, 5], [4, 7, 5], [6, 7]]
    assert [batch.shared for batch in batches] == [2, 1, 1]
    assert [len(batch) for batch in batches] == [3, 3, 2]
    for batch in batches:
        x_t = batch.pairs.x_t[:, : batch.shared]
        assert torch.equal(x_t[0], x_t[1])
        assert batch.cond is cond
    together = PreferencePairs.cat([batch.pairs for batch in batches])
    assert sorted(together.x_prev[:, :, 0, 0, 0].flatten().tolist()) == sorted(
        pairs.x_prev[:, :, 0, 0, 0].flatten().tolist()
    )


def test_pairs_of_single_steps_keep_their_order_and_share_all(cond):
    pairs = spo_pairs()
    batches = list(micro_batches(pairs, 5, cond))
    assert [batch.shared for batch in batches] == [5, 3]
    assert torch.equal(torch.cat([batch.pairs.step for batch in batches]), pairs.step)


def test_no_pairs_give_no_micro_batch_and_have_no_reference(learner, cond):
    assert list(micro_batches(mspo_pairs()[:0], 4, cond)) == []
    assert list(learner(passes=2).batches(mspo_pairs()[:0], cond, torch.Generator())) == []
    assert len(learner().with_reference(mspo_pairs()[:0], cond)) == 0


@pytest.mark.parametrize("guided, halves", [(True, 2), (False, 1)], ids=["guided", "unguided"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_latent_is_seen_once_and_every_pair_gets_its_own_prediction(learner, cond, count, guided, halves):
    """Against one forward for the winners and one for the losers, as published implementations run it."""
    learner, seen = learner(guided=guided), []
    policy, schedule = learner.policy, learner.schedule

    def counted(x, t, cond, guided):
        seen.append(len(x))
        return type(policy).eps(policy, x, t, cond, guided)

    policy.eps = counted
    for batch in micro_batches(mspo_pairs(), count, cond):
        pairs = batch.pairs
        eps = learner.predict(batch)
        assert seen.pop() == 2 * len(pairs) - batch.shared
        assert eps.shape == (halves, 2, len(pairs), 4, 8, 8)
        for side in range(2):
            t = schedule.timesteps(pairs.step, len(pairs))
            expected = type(policy).eps(policy, pairs.x_t[side], t, cond[pairs.prompt], guided)
            torch.testing.assert_close(eps[:, side], expected, rtol=0, atol=2e-6)


def test_an_unguided_update_of_a_guided_rollout_takes_the_prompts_prediction_alone(learner, diffusion, cond):
    pairs, learner = mspo_pairs(), learner(guided=False)
    guided, unguided = learner.schedule, diffusion.schedule(20, 1.0, 1.0)
    with torch.no_grad():
        eps = learner.predict(MicroBatch(pairs, 0, cond))
    moved = eps + 0.1 * torch.randn(eps.shape, generator=torch.Generator().manual_seed(1))
    log_ratio = guided.log_ratio(pairs.x_prev, pairs.x_t, moved, eps, pairs.step)
    assert torch.equal(log_ratio, unguided.log_ratio(pairs.x_prev, pairs.x_t, moved, eps, pairs.step))


@pytest.mark.parametrize("pairs", [spo_pairs(), mspo_pairs()], ids=["spo", "mspo"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_pairs_with_their_reference_train_the_same_bits(learner, cond, pairs, guided):
    """In the first pass; and in a later one, shuffled, the reference is still that of each pair."""
    learner = learner(micro_batch=3, guided=guided)
    rng, parameters = torch.Generator().manual_seed(2), learner.policy.parameters
    for parameter in parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=rng))

    def gradients(pairs):
        losses = [learner.loss(batch)[0] for batch in learner.batches(pairs, cond, rng)]
        assert len(losses) == 3
        return [grad for loss in losses for grad in torch.autograd.grad(loss, parameters)]

    referenced = learner.with_reference(pairs, cond)
    assert referenced.eps_ref.shape == (2 if guided else 1, len(pairs.x_t), 8, 4, 8, 8)
    for one, other in zip(gradients(pairs), gradients(referenced), strict=True):
        assert one.any()
        assert torch.equal(one, other)
    again = referenced.shuffle(rng)
    assert not torch.equal(again.step, referenced.step)
    (batch,) = micro_batches(again, 8, cond)
    torch.testing.assert_close(batch.pairs.eps_ref, learner.predict_reference(batch), rtol=0, atol=2e-6)


def test_passes_go_over_the_same_kept_pairs_each_in_an_order_of_its_own(learner, cond):
    """The first pass in the order given; the reference is asked once, and its predictions stay with their pairs."""
    pairs, learner = spo_pairs(), learner(micro_batch=3, passes=2, keep_pairs=0.6)
    batches = list(learner.batches(pairs, cond, torch.Generator().manual_seed(3)))
    assert [len(batch) for batch in batches] == [3, 2] * 2
    one, two = (PreferencePairs.cat([batch.pairs for batch in batches[i : i + 2]]) for i in (0, 2))
    assert torch.equal(one.x_prev, pairs.x_prev[:, :5])
    rows = [one.x_prev[0, :, 0, 0, 0].tolist().index(value) for value in two.x_prev[0, :, 0, 0, 0].tolist()]
    assert sorted(rows) == list(range(5))
    assert rows != list(range(5))
    assert torch.equal(two.eps_ref, one.eps_ref[:, :, rows])


@pytest.mark.parametrize("keys, count", [({}, 4), ({"passes": 3}, 12), ({"keep_pairs": 0.5}, 2),
                                         ({"keep_pairs": 0.6}, 3), ({"passes": 2, "keep_pairs": 0.1}, 2)])  # fmt: skip
def test_passes_and_the_share_of_the_pairs_set_the_number_of_micro_batches(learner, cond, keys, count):
    """Of eight pairs, two in a micro-batch."""
    learner = learner(micro_batch=2, **keys)
    assert len(list(learner.batches(spo_pairs(), cond, torch.Generator()))) == learner.batch_count(8) == count


def test_the_surest_pairs_are_those_whose_scores_differ_most(learner, cond):
    pairs = replace(spo_pairs(), gap=torch.tensor([0.5, 3.0, 1.0, 2.0, 0.1, 4.0, 0.2, 0.3]))
    rng = torch.Generator().manual_seed(0)
    kept = learner(keep_pairs=0.5, keep_by="surest").batches(pairs, cond, rng)
    assert torch.cat([batch.pairs.gap for batch in kept]).tolist() == [3.0, 1.0, 2.0, 4.0]
    kept = learner(keep_pairs=0.5).batches(pairs, cond, rng)
    assert torch.cat([batch.pairs.gap for batch in kept]).tolist() == pairs.gap[:4].tolist()


def test_the_half_without_the_prompt_may_be_left_without_gradient(learner, cond):
    """The loss is the same; its gradient is what reaches the half with the prompt."""
    pairs, whole, part = spo_pairs(), learner(guided=True), learner(guided="text")
    batch, policy, rng = MicroBatch(pairs, len(pairs), cond), whole.policy, torch.Generator().manual_seed(2)
    for parameter in policy.parameters:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    without, prompted = whole.predict(batch)
    eps = torch.stack([without.detach(), prompted])
    log_ratio = whole.schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, whole.predict_reference(batch), pairs.step)
    loss, _ = spo_loss(log_ratio, part.config.beta, part.config.clip)
    found, _ = part.loss(batch)
    torch.testing.assert_close(found, whole.loss(batch)[0])
    for one, other in zip(
        torch.autograd.grad(found, policy.parameters), torch.autograd.grad(loss, policy.parameters), strict=True
    ):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
