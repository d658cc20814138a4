"""methods/spo/loss: the golden loss of a micro-batch, from latents to gradients of the LoRA, and its own rules."""

import math

import pytest
import torch
from peft import set_peft_model_state_dict
from torch.autograd import gradcheck

from strop.engine.config.training import OptimConfig
from strop.engine.methods.spo.loss import spo_loss
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.models.conditioning import Conditioning
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

BETA, CLIP = 10.0, 0.1
LOW, HIGH = math.log1p(-CLIP), math.log1p(CLIP)
LOSS = 5e-6
GRADIENTS = 2e-5  # relative, 2-norm
TAGS = ["unclipped_cfg", "mixedclip_cfg", "upperclip_cfg", "unclipped_nocfg"]


@pytest.fixture(params=TAGS)
def tag(request):
    return request.param


@pytest.fixture
def case7(golden, tag):
    return case7_of(golden("case7_spo_loss_sd15"), tag)


def case7_of(tensors, tag):
    """The tensors of one tag, its name taken off; lora_A is recorded once, for it is the same in all."""
    first = {k.removeprefix("unclipped_cfg/"): v for k, v in tensors.items() if k.startswith("unclipped_cfg/lora/")}
    of_tag = {k.removeprefix(f"{tag}/"): v for k, v in tensors.items() if k.startswith(f"{tag}/")}
    return first | of_tag


@pytest.fixture
def schedule(alphas, tag):
    return schedule_of(alphas, tag)


def schedule_of(alphas, tag):
    return Schedule(DDIMCoefficients.build(alphas, 20, 1.0), 1.0 if tag.endswith("nocfg") else 5.0)


@pytest.fixture
def pairs(case7, schedule):
    return recorded_pairs(case7, schedule)


def recorded_pairs(case7, schedule):
    """Six pairs of the golden rollout, each with a prompt of its own."""
    step = torch.tensor([schedule.t.index(t) for t in case7["in/timesteps"].flatten().tolist()])
    return PreferencePairs(
        x_t=case7["in/latents"].transpose(0, 1),
        x_prev=case7["in/next_latents"].transpose(0, 1).contiguous(),
        step=step,
        prompt=torch.arange(6),
        shared=torch.full((6,), True),
    )


@pytest.fixture
def learner(policy, schedule, case7):
    return learner_of(with_lora(policy, case7), schedule)


def with_lora(policy, case7):
    """The policy with the golden LoRA of the tag."""
    lora = {k: v for k, v in case7.items() if k.startswith("lora/")}
    state = {k.removeprefix("lora/").replace(".default", ""): v for k, v in lora.items()}
    set_peft_model_state_dict(policy.unet, state)
    return policy


def learner_of(policy, schedule):
    return Learner(policy, schedule, OptimConfig(beta=BETA, clip=CLIP))


@pytest.fixture
def batch(pairs, case7):
    return batch_of(pairs, case7)


def batch_of(pairs, case7):
    cond = Conditioning(case7["in/prompt_embeds"][:, 0], case7["in/neg_prompt_embed"])
    return MicroBatch(pairs, len(pairs), cond)


def log_probs(learner, batch):
    """(2, N) of the policy, of the reference, and the log-ratio, of what the learner predicts."""
    schedule, pairs = learner.schedule, batch.pairs
    eps, eps_ref = learner.predict(batch), learner.predict_reference(batch)  # (G, 1, N, C, H, W)
    logp, logp_ref = (schedule.log_prob(pairs.x_prev, pairs.x_t, each, pairs.step) for each in (eps, eps_ref))
    return logp, logp_ref, schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, eps_ref, pairs.step)


def precisions(case7):
    """The one without guidance was recorded in float32 only."""
    return [precision for precision in ("f32", "f64") if f"{precision}/loss" in case7]


def check_published(case7, logp, logp_ref, log_ratio, loss):
    for precision in precisions(case7):
        for row in range(2):
            for values, name in ((logp, "total_prob"), (logp_ref, "total_ref_prob")):
                expected = case7[f"{precision}/{name}_{row}"].double()
                torch.testing.assert_close(values[row].detach().double(), expected, rtol=0, atol=LOSS)
            ratio = log_ratio[row].detach().exp()
            for values, name in ((ratio, "unclamped_ratio"), (ratio.clamp(0.9, 1.1), "ratio")):
                expected = case7[f"{precision}/{name}_{row}"].double()
                torch.testing.assert_close(values.double(), expected, rtol=0, atol=2 * LOSS)
        assert loss.item() == pytest.approx(case7[f"{precision}/loss"].item(), abs=LOSS)


def test_the_golden_loss_from_the_noise_predictions(case7, schedule, pairs):
    assert torch.equal(case7["f32/noise_pred_0"], case7["f32/noise_pred_1"])  # what lets a pair share one forward
    eps, eps_ref = (case7[f"f32/{name}_0"][None, None] for name in ("noise_pred", "noise_ref_pred"))
    logp, logp_ref = (schedule.log_prob(pairs.x_prev, pairs.x_t, each, pairs.step) for each in (eps, eps_ref))
    log_ratio = schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, eps_ref, pairs.step)
    loss, _ = spo_loss(log_ratio, BETA, CLIP)
    check_published(case7, logp, logp_ref, log_ratio, loss)


def test_the_golden_loss_of_a_micro_batch(case7, learner, batch):
    forwards = []
    with learner.policy.unet.register_forward_hook(lambda module, args, out: forwards.append(len(args[0]))):
        loss, stats = learner.loss(batch)
    assert forwards == ([6, 6] if learner.schedule.guidance == 1 else [12, 12])  # winner and loser share one forward
    check_published(case7, *log_probs(learner, batch), loss)
    assert stats["loss"].item() == loss.item()
    outside = torch.stack([case7["f32/unclamped_ratio_0"], case7["f32/unclamped_ratio_1"]])
    assert stats["clipped"].item() == pytest.approx(((outside < 0.9) | (outside > 1.1)).float().mean().item())


def test_the_golden_gradients_of_the_lora(case7, learner, batch):
    learner.loss(batch)[0].backward()
    gradients = {name: p.grad for name, p in learner.policy.unet.named_parameters() if p.requires_grad}
    recorded = {k.removeprefix("f32/grad/"): v for k, v in case7.items() if k.startswith("f32/grad/")}
    assert gradients.keys() == recorded.keys()
    assert len(gradients) == 64
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm().item()
    assert torch.stack([(gradients[name] - recorded[name]).norm() for name in gradients]).norm() < GRADIENTS * norm
    for precision in precisions(case7):
        assert norm == pytest.approx(case7[f"{precision}/grad_norm"].item(), rel=GRADIENTS)


@pytest.mark.parametrize("tag", ["unclipped_cfg"], indirect=True)
def test_the_golden_gradients_in_float64(case7, learner, batch):
    learner.loss(batch)[0].backward()
    recorded = {k.removeprefix("f64/grad/"): v for k, v in case7.items() if k.startswith("f64/grad/")}
    assert len(recorded) == 64
    for name, expected in recorded.items():
        error = (learner.policy.unet.get_parameter(name).grad - expected).norm() / expected.norm()
        assert error < 10 * GRADIENTS, name  # of one tensor; those with the smallest gradients lose most


def test_the_tags_differ_in_what_is_clipped(golden):
    """So that together they cover none, some, and the upper edge."""
    case7 = golden("case7_spo_loss_sd15")
    ratios = {tag: torch.stack([case7[f"{tag}/f32/unclamped_ratio_{row}"] for row in range(2)]) for tag in TAGS}
    clipped = {tag: ((ratio < 0.9) | (ratio > 1.1)).sum().item() for tag, ratio in ratios.items()}
    assert clipped["unclipped_cfg"] == 0
    assert clipped["unclipped_nocfg"] == 0
    assert 0 < clipped["mixedclip_cfg"] < 12
    assert (ratios["upperclip_cfg"] > 1.1).any()


@pytest.mark.parametrize("tag", ["unclipped_cfg"], indirect=True)
def test_a_fresh_policy_has_loss_ln_2_and_still_a_gradient(schedule, batch, policy):
    """B = 0: policy and reference are equal, and only B is pulled, for the gradient of A passes through it."""
    loss, stats = learner_of(policy, schedule).loss(batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert {name: value.item() for name, value in stats.items() if name != "loss"} == {
        "margin": 0.0,
        "accuracy": 0.5,
        "clipped": 0.0,
    }
    loss.backward()
    for name, p in policy.unet.named_parameters():
        if "lora_A" in name:
            assert not p.grad.any(), name
        elif "lora_B" in name:
            assert p.grad.any(), name


def log_ratios(*pairs):
    """Log-ratios (2, N) in float64 of each (winner, loser)."""
    return torch.tensor(pairs, dtype=torch.float64).T.contiguous().requires_grad_()


def test_loss_and_stats_by_hand():
    log_ratio = log_ratios((0.05, -0.02), (-0.3, 0.01), (0.2, 0.4), (-0.5, 0.3))
    loss, stats = spo_loss(log_ratio, beta=2.0, clip=0.1)
    margins = [2 * 0.07, 2 * (LOW - 0.01), 2 * (HIGH - HIGH), 2 * (LOW - HIGH)]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, rel=1e-12)
    assert stats["loss"].item() == loss.item()
    assert stats["margin"].item() == pytest.approx(2 * (0.07 - 0.31 - 0.2 - 0.8) / 4, rel=1e-12)
    assert stats["accuracy"].item() == 0.25
    assert stats["clipped"].item() == pytest.approx(5 / 8)
    assert not any(value.requires_grad for value in stats.values())


def test_equal_policies_have_loss_ln_2():
    loss, _ = spo_loss(torch.zeros(2, 7), BETA, CLIP)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_loss_stays_between_its_bounds():
    """|log r_w - log r_l| <= log(1.1 / 0.9), so with beta 10 the loss lies in [0.126, 2.133]."""
    best, _ = spo_loss(log_ratios((1e3, -1e3)), BETA, CLIP)
    worst, _ = spo_loss(log_ratios((-1e3, 1e3)), BETA, CLIP)
    assert best.item() == pytest.approx(0.126, abs=5e-4)
    assert worst.item() == pytest.approx(2.133, abs=5e-4)


def gradient(*pairs):
    log_ratio = log_ratios(*pairs)
    spo_loss(log_ratio, BETA, CLIP)[0].backward()
    return log_ratio.grad


def test_the_clamp_is_inclusive_at_its_edges():
    inside = gradient((HIGH, LOW), (LOW, HIGH))
    assert inside.all()
    beyond = 1e-12
    assert gradient((HIGH + beyond, 0.0))[0].item() == 0.0
    assert gradient((LOW - beyond, 0.0))[0].item() == 0.0
    assert gradient((HIGH - beyond, 0.0))[0].item() != 0.0


@pytest.mark.parametrize("side", [0, 1], ids=["winner", "loser"])
@pytest.mark.parametrize("far", [-0.5, 0.5], ids=["below", "above"])
def test_a_clamped_side_has_no_gradient_and_the_other_has_all_of_it(side, far):
    ratios = [0.02, 0.02]
    ratios[side] = far
    slopes = gradient(ratios)[:, 0].tolist()
    winner, loser = (min(max(value, LOW), HIGH) for value in ratios)
    slope = BETA / (1 + math.exp(BETA * (winner - loser)))  # beta * sigmoid(-margin)
    assert slopes[side] == 0.0
    assert slopes[1 - side] == pytest.approx((-slope, slope)[1 - side], rel=1e-12)


def test_two_clamped_sides_have_loss_ln_2_and_no_gradient():
    log_ratio = log_ratios((5.0, 4.0))
    loss, _ = spo_loss(log_ratio, BETA, CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert not log_ratio.grad.any()


def test_gradient_by_finite_differences():
    """Away from the edges, where there is no derivative."""
    log_ratio = log_ratios((0.05, -0.02), (-0.3, 0.01), (0.2, 0.4), (0.09, -0.08))
    assert gradcheck(lambda r: spo_loss(r, BETA, CLIP)[0], (log_ratio,))


def test_a_huge_margin_is_finite():
    log_ratio = log_ratios((0.0, 5.0))
    loss, _ = spo_loss(log_ratio, beta=1e5, clip=0.5)
    assert loss.item() == pytest.approx(1e5 * math.log(1.5), rel=1e-9)
    loss.backward()
    assert torch.isfinite(log_ratio.grad).all()


def test_without_a_clamp_the_margin_is_free():
    log_ratio = torch.tensor([[0.5, -0.3], [-0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    loss, stats = spo_loss(log_ratio, BETA, None)
    margin = BETA * (log_ratio[0] - log_ratio[1])
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item())
    assert stats["clipped"] == 0
    loss.backward()
    assert (log_ratio.grad != 0).all()
