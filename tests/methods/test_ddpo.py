"""methods/ddpo: the authors' advantages, losses and gradients, and whole iterations beside unrolled ones."""

import math

import pytest
import torch

from strop.engine import train
from strop.engine.methods.ddpo import History, ppo_loss
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients


@pytest.fixture(scope="module")
def case3(golden):
    return golden("methods/case3_ddpo")


@pytest.mark.parametrize(
    "tag, longest, least", [("buf16_min16", 16, 16), ("buf6_min4", 6, 4), ("buf6_min4_small", 6, 4)]
)
def test_advantages_are_those_of_the_authors_tracker(case3, tag, longest, least):
    of_tag = {key.removeprefix(f"adv/{tag}/"): value for key, value in case3.items() if f"adv/{tag}/" in key}
    history, none = History(longest, least), History(None, 1)
    for epoch, (ids, rewards) in enumerate(zip(of_tag["in/prompt_ids"].tolist(), of_tag["in/rewards"], strict=True)):
        prompts, rewards = [f"prompt {i}" for i in ids], rewards.double().tolist()
        for known, name in ((history, "advantages"), (none, "advantages_untracked")):
            actual = torch.tensor(known.advantages(prompts, rewards), dtype=torch.float64)
            torch.testing.assert_close(actual, of_tag[f"f64/{name}"][epoch].double(), rtol=1e-6, atol=1e-9)
    counts = [len(history.rewards.get(f"prompt {i}", ())) for i in range(len(of_tag["final_count"]))]
    assert counts == of_tag["final_count"].tolist()


def test_rewards_that_are_not_finite_are_not_remembered():
    history = History(4, 1)
    assert history.advantages(["a", "a", "a"], [1.0, math.nan, 3.0]) == pytest.approx([-1, 0, 1], abs=1e-5)
    assert list(history.rewards["a"]) == [1.0, 3.0]


@pytest.mark.parametrize("width, dtype", [("f32", torch.float32), ("f64", torch.float64)])
def test_losses_and_gradients_are_the_authors(case3, alphas, width, dtype):
    schedule = Schedule(DDIMCoefficients.build(alphas, 50, 1.0), 5.0)
    read = lambda name: case3[f"ppo/{name}"]
    for j in range(2):
        eps = read("in/noise_pred")[j].to(dtype).unflatten(0, (2, 6)).clone().requires_grad_()
        step = torch.tensor([schedule.t.index(t) for t in read("in/timesteps")[:, j].tolist()])
        x_t, x_prev = (read(f"in/{name}")[:, j].to(dtype) for name in ("latents", "next_latents"))
        log_prob = schedule.log_prob(x_prev[None], x_t[None], eps.unsqueeze(1), step)[0]
        log_ratio = log_prob - read("in/old_log_probs")[:, j].to(dtype)
        loss, stats = ppo_loss(log_ratio, read("in/advantages").to(dtype), clip=1e-4, advantage_clip=5.0)
        expected = lambda name: read(f"{width}/step{j}/{name}")  # noqa: B023
        torch.testing.assert_close(log_prob.detach(), expected("log_prob").to(dtype), rtol=0, atol=1e-6)
        torch.testing.assert_close(loss.detach(), expected("loss").to(dtype), rtol=0, atol=5e-7)
        assert stats["clipped"] == expected("clipfrac")
        assert stats["approx_kl"].item() == pytest.approx(expected("approx_kl").item(), abs=1e-9)
        loss.backward()
        gradient = expected("grad_noise_pred").unflatten(0, (2, 6))
        assert (eps.grad - gradient).norm() <= 2e-5 * gradient.norm()


def test_the_clip_takes_the_gradient_only_from_ratios_that_went_the_way_they_should():
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -9.0])
    loss, stats = ppo_loss(log_ratio, advantage, clip=0.1, advantage_clip=5.0)
    loss.backward()
    up, down = math.exp(0.5), math.exp(-0.5)
    assert loss.item() == pytest.approx((-1.1 - down + up + 5 * 0.9) / 4)
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0, -down, up, 0]) / 4)
    assert stats["clipped"] == 1


def naive_iteration(run):
    """DDPO as published, in loops: trajectories and their log-probabilities, advantages, updates on their steps."""
    config, count, total = run.config, len(run.cond), run.config.rollout.num_steps
    rng = torch.Generator().manual_seed(config.run.seed)
    prior = torch.randn(count, *run.policy.latent_shape, generator=rng)
    noises = torch.stack([torch.randn(count, *run.policy.latent_shape, generator=rng) for _ in range(total)])
    states = [run.trajectory(prior[j], noises[:, j], j) for j in range(count)]
    with torch.no_grad():
        old = [[run.log_prob(s[i + 1], s[i], i, j).item() for i in range(total)] for j, s in enumerate(states)]
    images = run.parts.models.diffusion.decode(torch.stack([s[-1] for s in states]))
    rewards = run.method.reward(images, run.method.prompts.texts(0), run.cond)[0].double()
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    size, adamw, ratios = count // config.optim.updates, run.adamw(), []
    for start in range(0, count, size):
        for j in order[start : start + size]:
            for i in range(total):
                ratio = (run.log_prob(states[j][i + 1], states[j][i], i, j) - old[j][i]).exp()
                clamped = ratio.clamp(1 - config.optim.clip, 1 + config.optim.clip)
                loss = torch.maximum(-advantages[j] * ratio, -advantages[j] * clamped)
                (loss / (size * total)).backward()
                ratios.append(ratio.item())
        adamw.step()
        adamw.zero_grad()
    return rewards, ratios


def test_a_whole_iteration_is_the_unrolled_one(method_recipe, unrolled):
    keys = ("rollout.prompts=4", "optim.updates=2", "optim.micro_batch=4", "optim.clip=0.05", "optim.lr=2")
    arguments = method_recipe("ddpo", *unrolled.PLAIN_STEPS, *keys)
    fused, loops = unrolled(arguments), unrolled(arguments)
    before = fused.lora()
    facts, _ = fused.iterate()
    rewards, ratios = naive_iteration(loops)
    assert facts["reward"].item() == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert max(abs(ratio - 1) for ratio in ratios[:8]) < 1e-5  # the policy that sampled
    assert max(abs(ratio - 1) for ratio in ratios[8:]) > 1e-3  # the one after an update
    for name, value in loops.lora().items():
        moved = (value - before[name]).norm()
        assert moved > 1e-5, name
        assert (fused.lora()[name] - value).norm() <= 2e-3 * moved, name


def test_a_resumed_run_has_the_same_bits_and_remembers_rewards(method_recipe, tmp_path):
    keys = ("optim.history=2", "optim.min_history=2", "rollout.prompts=2", "optim.updates=1")
    folders = tmp_path / "whole", tmp_path / "parts"
    train.main(method_recipe("ddpo", *keys, "run.iterations=4", f"run.dir={folders[0]}"))
    train.main(method_recipe("ddpo", *keys, "run.iterations=2", f"run.dir={folders[1]}"))
    train.main(method_recipe("ddpo", *keys, "run.iterations=4", "run.resume=true", f"run.dir={folders[1]}"))
    last = [folder / "checkpoints" / "000004" for folder in folders]
    for name in ("pytorch_lora_weights.safetensors", "rewards.json"):
        a, b = ((folder / name).read_bytes() for folder in last)
        assert a[-500:] == b[-500:], name
    assert "[" in (last[0] / "rewards.json").read_text()
