"""methods/d3po: the authors' numbers, DenseReward's, and a whole iteration beside an unrolled one, draw for draw."""

import math

import pytest
import torch

from strop.engine import train
from strop.engine.methods.d3po import d3po_loss, discounted_loss, preferred, step_weights
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

WIDTHS = [("f32", torch.float32), ("f64", torch.float64)]


@pytest.fixture(scope="module")
def case2(golden):
    return golden("methods/case2_d3po")


@pytest.fixture(scope="module")
def case6(golden):
    return golden("methods/case6_dense_reward")


def with_prefix(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def schedule(alphas, steps, guidance):
    return Schedule(DDIMCoefficients.build(alphas, steps, 1.0), guidance)


@pytest.mark.parametrize("width, dtype", WIDTHS)
@pytest.mark.parametrize("tag, guidance", [("cfg", 5.0), ("nocfg", 1.0)])
def test_losses_and_gradients_are_the_authors(case2, alphas, tag, guidance, width, dtype):
    """Of a pair that prefers its first trajectory and of a tie, at five steps; both halves' gradients."""
    steps, halves = schedule(alphas, 20, guidance), slice(1 if guidance == 1 else 0, 2)
    better = preferred(case2["in/rewards"].T[None])  # rewards (pairs, trajectories)
    assert better.tolist() == [1, 0]
    x_t, x_prev = (case2[f"in/{name}"].to(dtype) for name in ("latents", "next_latents"))  # (pairs, 2, steps, ...)
    for j, t in enumerate(case2["in/timesteps"][0].tolist()):
        expected = with_prefix(case2, f"{tag}/{width}/step{j}/")
        eps, eps_ref = (  # (G, 2, pairs, ...), of the recorded (2, 2 pairs, ...)
            case2[f"in/{name}"][j].to(dtype).unflatten(1, (2, 2)).transpose(0, 1)[halves].contiguous()
            for name in ("noise_pred", "noise_ref_pred")
        )
        eps.requires_grad_()
        step = torch.full((2,), steps.t.index(t))
        states = [x[:, :, j].transpose(0, 1).contiguous() for x in (x_prev, x_t)]
        log_ratio = steps.log_ratio(*states, eps, eps_ref, step)
        loss, _ = d3po_loss(log_ratio, better == 0, 0.1, 0.1)
        ratios = torch.stack([expected["unclamped_ratio_0"], expected["unclamped_ratio_1"]])
        torch.testing.assert_close(log_ratio.detach().exp(), ratios, rtol=0, atol=6e-6)
        torch.testing.assert_close(loss.detach().to(dtype), expected["loss"], rtol=0, atol=3e-7)
        loss.backward()
        gradient = expected["grad_noise_pred"].unflatten(1, (-1, 2)).transpose(0, 1)  # (G, 2, pairs, ...)
        assert (eps.grad - gradient).norm() <= 3e-5 * gradient.norm()


def test_a_tie_costs_ln_2_and_teaches_nothing():
    log_ratio = torch.tensor([[0.05, 0.5], [-0.02, 0.0]], requires_grad=True)
    loss, stats = d3po_loss(log_ratio, torch.tensor([True, False]), 0.1, 0.1)
    clamped = math.log1p(0.1)
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-0.1 * clamped))) / 2)
    loss.backward()
    assert log_ratio.grad[:, 0].tolist() == [0, 0]
    assert log_ratio.grad[0, 1] == 0  # clamped
    assert log_ratio.grad[1, 1] > 0
    assert stats["accuracy"] == 0.75  # a tie counts half


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([[[1.0], [0.0]]], [1]),
        ([[[0.0], [1.0]]], [-1]),
        ([[[1.0], [1.0]]], [0]),
        ([[[1.0], [0.0]], [[0.5], [0.5]]], [1]),  # equal in one, better in the other
        ([[[1.0], [0.0]], [[0.0], [1.0]]], [0]),  # not to be compared
        ([[[float("nan")], [1.0]]], [0]),
    ],
)
def test_a_trajectory_is_better_if_it_dominates(rewards, expected):
    assert preferred(torch.tensor(rewards)).tolist() == expected


@pytest.mark.parametrize("width, dtype", WIDTHS)
@pytest.mark.parametrize("tag, beta, clip", [("single_k2", 10.0, 1e-4), ("multi_k2", 12.5, 5e-4)])
def test_the_discounted_loss_is_dense_rewards(case6, alphas, tag, beta, clip, width, dtype):
    steps, group = schedule(alphas, 50, 7.5), lambda name: case6[f"{tag}/{name}"]
    drawn, distinct = group("sampled_step_indices").tolist(), group("in/step_indices").tolist()
    at = [distinct.index(i) for i in drawn]
    reward = group("in/final_reward")  # (prompts, 2)
    order = reward.argsort(1, descending=True)  # winner first
    rows = torch.arange(2)[:, None]

    def arranged(name):  # (prompts, 2, draws, ...) -> (..., 2, prompts * draws, ...)
        return group(name)[:, :, at][rows, order].to(dtype).transpose(0, 1).flatten(1, 2)

    eps, eps_ref = (arranged(f"in/{name}").movedim(2, 0).clone() for name in ("noise_pred", "noise_pred_init"))
    eps.requires_grad_()
    step = torch.tensor(drawn).repeat(2)
    log_ratio = steps.log_ratio(arranged("in/next_state"), arranged("in/state"), eps, eps_ref, step)
    ratio = (group(f"{width}/log_prob") - group(f"{width}/log_prob_init"))[rows, order].transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(log_ratio.detach(), ratio.to(dtype), rtol=0, atol=8e-7)
    loss, _ = discounted_loss(log_ratio, torch.zeros(len(step), dtype=bool), beta, clip, len(drawn))
    torch.testing.assert_close(loss.detach().to(dtype), group(f"{width}/loss").to(dtype), rtol=0, atol=4e-6)
    loss.backward()
    of_draws = eps.grad.movedim(0, 2).unflatten(1, (2, -1)).transpose(0, 1)  # (prompts, 2, draws, halves, ...)
    actual = torch.zeros_like(group(f"{width}/grad_noise_pred"))
    for place, column in enumerate(at):  # a step drawn twice adds up
        actual[rows, order, column] += of_draws[:, :, place].to(actual.dtype)
    expected = group(f"{width}/grad_noise_pred")
    assert (actual - expected).norm() <= 5e-6 * expected.norm()


def test_steps_are_drawn_by_a_geometric_weight(case6):
    torch.testing.assert_close(step_weights(50, 0.9), case6["weights/gamma0.9/probabilities"])
    torch.testing.assert_close(step_weights(50, 1.0), case6["weights/gamma1/probabilities"])


def naive_iteration(run, pairs_per_step):
    """D3PO as published, in loops: both trajectories, their rewards, each step's loss, an update per group of pairs."""
    config, method = run.config, run.method
    count, total = len(run.cond), config.rollout.num_steps
    rng = torch.Generator().manual_seed(config.run.seed)
    prior = torch.randn(count, *run.policy.latent_shape, generator=rng)
    noises = torch.stack([torch.randn(2 * count, *run.policy.latent_shape, generator=rng) for _ in range(total)])
    states = [run.trajectory(prior[j % count], noises[:, j], j % count) for j in range(2 * count)]
    images = run.parts.models.diffusion.decode(torch.stack([s[-1] for s in states]))
    texts = method.prompts.texts(0)
    rewards = method.reward(images, texts * 2, run.cond.repeat(2))[0].tolist()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    adamw, losses = run.adamw(), []
    for start in range(0, count, pairs_per_step):
        for pair in order[start : start + pairs_per_step]:
            h = 1 if rewards[pair] > rewards[count + pair] else -1
            for step in range(total):
                terms = []
                for j, sign in ((pair, h), (count + pair, -h)):
                    x, x_prev = states[j][step], states[j][step + 1]
                    log_prob = run.log_prob(x_prev, x, step, pair)
                    with run.policy.reference():
                        reference = run.log_prob(x_prev, x, step, pair)
                    ratio = (log_prob - reference).exp().clamp(1 - config.optim.clip, 1 + config.optim.clip)
                    terms.append(sign * ratio.log())
                loss = -torch.nn.functional.logsigmoid(config.optim.beta * sum(terms))
                (loss / (pairs_per_step * total)).backward()
                losses.append(loss.item())
        adamw.step()
        adamw.zero_grad()
    return rewards, losses


def test_a_whole_iteration_is_the_unrolled_one(method_recipe, unrolled):
    arguments = method_recipe("d3po", *unrolled.PLAIN_STEPS, "optim.micro_batch=4", "optim.pairs=1", "optim.beta=5")
    fused, loops = unrolled(arguments), unrolled(arguments)
    before = fused.lora()
    facts, _ = fused.iterate()
    rewards, losses = naive_iteration(loops, 1)
    assert facts["reward"].item() == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    assert len(set(rewards)) > 1
    assert any(abs(loss - math.log(2)) > 1e-4 for loss in losses)
    for name, value in loops.lora().items():
        moved = (value - before[name]).norm()
        assert moved > 1e-4, name
        assert (fused.lora()[name] - value).norm() <= 2e-3 * moved, name


@pytest.mark.parametrize(
    "keys", [(), ("optim.discount=0.9", "optim.micro_batch=3", "optim.beta=10")], ids=["", "discount"]
)
def test_a_resumed_run_has_the_same_bits(method_recipe, tmp_path, keys):
    lora = lambda folder: (folder / "lora" / "pytorch_lora_weights.safetensors").read_bytes()[-2000:]
    train.main(method_recipe("d3po", *keys, "run.iterations=3", f"run.dir={tmp_path / 'whole'}"))
    train.main(method_recipe("d3po", *keys, "run.iterations=2", f"run.dir={tmp_path / 'parts'}"))
    train.main(method_recipe("d3po", *keys, "run.iterations=3", "run.resume=true", f"run.dir={tmp_path / 'parts'}"))
    assert lora(tmp_path / "whole") == lora(tmp_path / "parts")
