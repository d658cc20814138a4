"""methods/gradspo: the numbers of its authors' program, its average, and a micro-batch beside the formula."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from strop.engine import train
from strop.engine.methods.gradspo import GradSPO, target_log_ratio
from strop.engine.methods.spo.loss import spo_loss
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.models.averaged import Average
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients


@pytest.fixture(scope="module")
def case5(golden):
    return golden("methods/case5_gradspo")


@pytest.mark.parametrize("width, dtype", [("f32", torch.float32), ("f64", torch.float64)])
def test_losses_and_gradients_are_the_authors(case5, alphas, width, dtype):
    """From branches: the recorded noises make x_prev, winner and loser are the best and the worst by score."""
    schedule = Schedule(DDIMCoefficients.build(alphas, 20, 1.0), 5.0)
    step = torch.tensor([schedule.t.index(t) for t in case5["in/timesteps"].tolist()])
    scores, noise = case5["in/preference_scores"], case5["in/candidate_noise"].to(dtype)
    chosen = torch.stack([scores.argmax(0), scores.argmin(0)])
    assert torch.equal(chosen, torch.stack([case5["pick/idx_max"], case5["pick/idx_min"]]))
    x_prev = schedule.sigma(step).view(-1, 1, 1, 1) * noise[chosen, torch.arange(5)]
    eps, eps_ref, eps_average = (
        case5[f"in/noise{n}_pred"].to(dtype).unflatten(0, (2, 5)) for n in ("", "_ref", "_ema")
    )
    eps.requires_grad_()
    method = SimpleNamespace(alphas=alphas.to(dtype), schedule=schedule)
    away = GradSPO.away(method, x_prev, step, 0.5)
    log_ratio = target_log_ratio(*(schedule.guide(e) for e in (eps, eps_ref, eps_average)), away)
    loss, _ = spo_loss(log_ratio, 10.0, 0.1)
    ratios = torch.stack([case5[f"sd15/{width}/unclamped_ratio_{k}"] for k in (0, 1)])
    torch.testing.assert_close(log_ratio.detach().exp(), ratios.to(dtype), rtol=0, atol=3e-7)
    torch.testing.assert_close(loss.detach(), case5[f"sd15/{width}/loss"].to(dtype), rtol=0, atol=6e-7)
    loss.backward()
    gradient = case5[f"sd15/{width}/grad_noise_pred"].unflatten(0, (2, 5))
    assert (eps.grad - gradient).norm() <= 2e-6 * gradient.norm()


def test_a_velocity_becomes_the_noise_that_is_in_x_t(alphas):
    """Of noisy latents whose clean ones and noise are known, by the definition of v (arXiv 2202.00512)."""
    rng, schedule = torch.Generator().manual_seed(0), Schedule(DDIMCoefficients.build(alphas, 20, 1.0), 5.0)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=rng)
    step = torch.tensor([0, 7, 19])
    a = alphas[schedule.timesteps(step, 3)].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
    pairs = PreferencePairs(x_t[None], x_t[None], step, step, step.bool())
    method = SimpleNamespace(alphas=alphas, schedule=schedule, predicts_v=True)
    found = GradSPO.noise(method, v.expand(2, 1, *v.shape), pairs)  # both guidance halves are right
    torch.testing.assert_close(found, noise, rtol=0, atol=2e-6)


def test_branches_of_one_score_teach_nothing():
    zero = torch.zeros(1, 4, 2, 2)
    eps = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, _ = spo_loss(target_log_ratio(eps, zero + 0.1, zero, away=zero), 10.0, 0.1)
    loss.backward()
    assert eps.grad.abs().max() == 0


def test_the_average_is_the_authors_and_stands_in_for_the_policy(case5):
    weight = nn.Parameter(case5["ema/in/ema_weight"].clone())
    average = Average([weight], decay=0.9)
    with torch.no_grad():
        weight.copy_(case5["ema/in/model_weight"])
    average.follow()
    torch.testing.assert_close(average.values[0], case5["ema/out_weight_decay0.9"], rtol=0, atol=1e-7)
    with average.in_place():
        assert torch.equal(weight, average.values[0])
    assert torch.equal(weight, case5["ema/in/model_weight"])


def test_a_micro_batch_is_the_formula(method_recipe, unrolled):
    """Both sides from predictions of one latent and one half at a time, in float64."""
    run = unrolled(method_recipe("gradspo", "optim.beta=3"))
    method = run.method
    for value in method.average.values:
        value.mul_(0.5)
    rows, _ = method.collect(0)
    (batch, *_) = method.batches(rows)
    loss, _ = method.loss(batch)
    alphas, total = method.alphas.double(), 0.0
    pairs: PreferencePairs = batch.pairs
    for i, (step, prompt) in enumerate(zip(pairs.step.tolist(), pairs.prompt.tolist(), strict=True)):
        x, t = pairs.x_t[0, i], run.t(step)
        with torch.no_grad():
            eps = run.eps(x, t, prompt).double()
            with method.average.in_place():
                average = run.eps(x, t, prompt).double()
            with run.policy.reference():
                reference = run.eps(x, t, prompt).double()
        mean, sigma = run.mean_and_sigma(x, average, step)
        z_best, z_worst = ((pairs.x_prev[j, i].double() - mean) / sigma for j in (0, 1))
        logs = []
        for side in (1, -1):
            target = average - 0.5 * (1 - alphas[t]).sqrt() * side * (z_best - z_worst) / 2
            log = -((eps - target) ** 2).mean() + ((reference - target) ** 2).mean()
            logs.append(log.exp().clamp(0.9, 1.1).log())
        total += -torch.nn.functional.logsigmoid(3 * (logs[0] - logs[1]))
    assert loss.item() == pytest.approx(total.item() / len(pairs), rel=1e-4)


def test_a_resumed_run_has_the_same_bits_and_average(method_recipe, tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    keys = ("optim.accumulate=3",)
    train.main(method_recipe("gradspo", *keys, "run.iterations=3", f"run.dir={folders[0]}"))
    train.main(method_recipe("gradspo", *keys, "run.iterations=2", f"run.dir={folders[1]}"))
    train.main(method_recipe("gradspo", *keys, "run.iterations=3", "run.resume=true", f"run.dir={folders[1]}"))
    for name in ("pytorch_lora_weights.safetensors", "average.safetensors"):
        a, b = ((folder / "checkpoints" / "000003" / name).read_bytes() for folder in folders)
        assert a[-2000:] == b[-2000:], name
