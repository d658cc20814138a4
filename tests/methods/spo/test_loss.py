"""methods/spo/loss: the golden loss of a micro-batch, from latents to gradients of the LoRA, and its own rules."""

import functools
import math

import pytest
import torch
from peft import set_peft_model_state_dict
from torch.autograd import gradcheck

from strop.engine.config.methods.spo import SPOOptimConfig
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


def case7_of(tensors, tag):
    """The tensors of one tag, its name taken off; lora_A is recorded once, for it is the same in all."""
    first = {k.removeprefix("unclipped_cfg/"): v for k, v in tensors.items() if k.startswith("unclipped_cfg/lora/")}
    of_tag = {k.removeprefix(f"{tag}/"): v for k, v in tensors.items() if k.startswith(f"{tag}/")}
    return first | of_tag


def schedule_of(alphas, tag):
    return Schedule(DDIMCoefficients.build(alphas, 20, 1.0), 1.0 if tag.endswith("nocfg") else 5.0)


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


def with_lora(policy, case7):
    """The policy with the golden LoRA of the tag."""
    lora = {k: v for k, v in case7.items() if k.startswith("lora/")}
    state = {k.removeprefix("lora/").replace(".default", ""): v for k, v in lora.items()}
    set_peft_model_state_dict(policy.unet, state)
    return policy


def learner_of(policy, schedule):
    return Learner(policy, schedule, SPOOptimConfig(beta=BETA, clip=CLIP))


def batch_of(pairs, case7):
    cond = Conditioning(case7["in/prompt_embeds"][:, 0], case7["in/neg_prompt_embed"])
    return MicroBatch(pairs, len(pairs), cond)


def log_probs(learner, batch):
    """(2, N) of the policy, of the reference, and the log-ratio, of what the learner predicts."""
    schedule, pairs = learner.schedule, batch.pairs
    eps, eps_ref = learner.predict(batch), learner.predict_reference(batch)  # (G, 1, N, C, H, W)
    logp, logp_ref = (schedule.log_prob(pairs.x_prev, pairs.x_t, each, pairs.step) for each in (eps, eps_ref))
    return logp, logp_ref, schedule.log_ratio(pairs.x_prev, pairs.x_t, eps, eps_ref, pairs.step)


@pytest.mark.parametrize("tag", TAGS)
def test_the_golden_loss_and_gradients_of_a_micro_batch(golden, alphas, policy, tag):
    case7, schedule = case7_of(golden("case7_spo_loss_sd15"), tag), schedule_of(alphas, tag)
    learner, batch = learner_of(with_lora(policy, case7), schedule), batch_of(recorded_pairs(case7, schedule), case7)
    forwards = []
    with policy.unet.register_forward_hook(lambda module, args, out: forwards.append(len(args[0]))):
        loss, stats = learner.loss(batch)
    assert forwards == ([6, 6] if schedule.guidance == 1 else [12, 12])  # winner and loser share one forward
    loss.backward()
    gradients = {name: p.grad for name, p in policy.unet.named_parameters() if p.requires_grad}
    norm = torch.stack([grad.norm() for grad in gradients.values()]).norm().item()
    logp, logp_ref, log_ratio = (values.detach() for values in log_probs(learner, batch))
    close = functools.partial(torch.testing.assert_close, rtol=0)
    for precision in ("f32", "f64"):
        if f"{precision}/loss" not in case7:  # the one without guidance was recorded in float32 only
            continue
        expected = lambda name, kind=precision: case7[f"{kind}/{name}"].double()
        for row in range(2):
            close(logp[row].double(), expected(f"total_prob_{row}"), atol=LOSS)
            close(logp_ref[row].double(), expected(f"total_ref_prob_{row}"), atol=LOSS)
            ratio = log_ratio[row].exp().double()
            close(ratio, expected(f"unclamped_ratio_{row}"), atol=2 * LOSS)
            close(ratio.clamp(0.9, 1.1), expected(f"ratio_{row}"), atol=2 * LOSS)
        assert loss.item() == pytest.approx(expected("loss").item(), abs=LOSS)
        assert norm == pytest.approx(expected("grad_norm").item(), rel=GRADIENTS)
        recorded = {k.removeprefix(f"{precision}/grad/"): v for k, v in case7.items() if f"{precision}/grad/" in k}
        if precision == "f32" or recorded:  # in float64 those of one tag
            assert gradients.keys() == recorded.keys()
            away = {name: (gradients[name] - recorded[name]).norm() for name in gradients}
            assert torch.stack([*away.values()]).norm() < GRADIENTS * norm
        if precision == "f64" and recorded:  # of one tensor; those with the smallest gradients lose most
            assert [name for name in away if away[name] > 10 * GRADIENTS * recorded[name].norm()] == []
    assert stats["loss"].item() == loss.item()
    outside = torch.stack([case7["f32/unclamped_ratio_0"], case7["f32/unclamped_ratio_1"]])
    assert stats["clipped"].item() == pytest.approx(((outside < 0.9) | (outside > 1.1)).float().mean().item())


def test_a_fresh_policy_has_loss_ln_2_and_still_a_gradient(golden, alphas, policy):
    """B = 0: policy and reference are equal, and only B is pulled, for the gradient of A passes through it."""
    case7, schedule = case7_of(golden("case7_spo_loss_sd15"), TAGS[0]), schedule_of(alphas, TAGS[0])
    loss, stats = learner_of(policy, schedule).loss(batch_of(recorded_pairs(case7, schedule), case7))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert [stats[name].item() for name in ("margin", "accuracy", "clipped")] == [0.0, 0.5, 0.0]
    loss.backward()
    for name, p in policy.unet.named_parameters():
        if "lora_" in name:
            assert p.grad.any() == ("lora_B" in name), name


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


@pytest.mark.parametrize("clip", [CLIP, None])
def test_gradient_by_finite_differences(clip):
    """Away from the edges, where there is no derivative; neither side clamped, one or the other, and both."""
    log_ratio = log_ratios((0.05, -0.02), (-0.3, 0.01), (0.5, 0.02), (0.02, -0.5), (0.02, 0.5), (0.2, 0.4))
    assert gradcheck(lambda r: spo_loss(r, BETA, clip)[0], (log_ratio,))


def test_a_huge_margin_is_finite():
    log_ratio = log_ratios((0.0, 5.0))
    loss, _ = spo_loss(log_ratio, beta=1e5, clip=0.5)
    assert loss.item() == pytest.approx(1e5 * math.log(1.5), rel=1e-9)
    loss.backward()
    assert torch.isfinite(log_ratio.grad).all()


def test_without_a_clamp_the_margin_is_free():
    loss, stats = spo_loss(log_ratios((0.5, -0.5), (-0.3, 0.2)), BETA, None)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-10)) + math.log1p(math.exp(5))) / 2)
    assert stats["clipped"] == 0
