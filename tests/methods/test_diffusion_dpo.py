"""methods/diffusion_dpo and methods/offline: the authors' numbers, and a whole iteration beside unrolled loops."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from strop.engine import train
from strop.engine.config.find import load
from strop.engine.methods.diffusion_dpo import changes, diffusion_dpo_loss, discounted
from strop.engine.methods.offline import errors, winner_first
from strop.engine.runtime.session import Session
from strop.engine.training import build


@pytest.fixture(scope="module")
def case1(golden):
    return golden("methods/case1_diffusion_dpo")


@pytest.mark.parametrize("beta", [5000, 2000])
@pytest.mark.parametrize(
    "dtype, logit, loss, gradient", [(torch.float32, 4e-8, 6e-5, 3e-5), (torch.float64, 2e-13, 1e-10, 1e-9)]
)
def test_losses_and_gradients_are_the_authors(case1, beta, dtype, logit, loss, gradient):
    """Winners are rows 0 to 5; tolerances are relative to beta, absolute and relative."""
    prediction, target, reference = (
        case1[f"in/{name}"].to(dtype).unflatten(0, (2, 6)) for name in ("model_pred", "target", "ref_pred")
    )
    prediction = prediction.clone().requires_grad_()
    expected = lambda name: case1[f"beta{beta}/f64/{name}"]
    change = changes(prediction, reference, target)
    actual, stats = diffusion_dpo_loss(change, beta)
    inside = -beta / 2 * (change[0] - change[1]).detach()
    assert (inside - expected("inside_term")).abs().max() <= logit * beta
    assert abs(actual.item() - expected("loss").item()) <= loss
    assert stats["margin"].item() == pytest.approx(expected("inside_term").mean().item(), abs=logit * beta)
    assert stats["accuracy"].item() == pytest.approx(expected("implicit_acc").item(), abs=1e-6)
    each = errors(prediction.detach(), target).flatten()
    assert (each - expected("model_losses")).abs().max() <= 2e-7
    actual.backward()
    exact = expected("grad_model_pred").unflatten(0, (2, 6))
    assert (prediction.grad - exact).norm() <= gradient * exact.norm()


def test_the_loss_is_right_for_no_change_and_for_large_ones():
    change = torch.tensor([[0.0, -1e-9, -3.0, 3.0, 1e-4], [0.0, 0.0, 2.0, -2.0, 1e-4]])
    logits = [0.0, 2.5e-6, 12_500.0, -12_500.0, 0.0]
    loss, stats = diffusion_dpo_loss(change.requires_grad_(), beta=5000.0)
    truth = [math.log1p(math.exp(-x)) if x > -50 else -x for x in logits]
    assert loss.item() == pytest.approx(sum(truth) / 5, rel=1e-6)
    assert stats["accuracy"].item() == pytest.approx((0.5 + 1 + 1 + 0 + 0.5) / 5)  # a change of nothing counts half
    loss.backward()
    weight = torch.tensor([0.5, 0.5, 0.0, 1.0, 0.5]) * 2500 / 5
    torch.testing.assert_close(change.grad, torch.stack([weight, -weight]), rtol=1e-5, atol=1e-7)


def test_changes_of_nearly_equal_predictions_keep_their_digits():
    rng = torch.Generator().manual_seed(0)
    reference, target, noise = torch.randn(3, 2, 4, 4, 8, 8, generator=rng)
    prediction = reference + 1e-5 * noise
    exact = errors(prediction.double(), target.double()) - errors(reference.double(), target.double())
    actual = changes(prediction, reference, target)
    assert ((actual - exact).abs() < 1e-3 * exact.abs().max()).all()
    subtracted = errors(prediction, target) - errors(reference, target)
    assert (subtracted - exact).abs().max() > 3 * (actual - exact).abs().max()


def test_the_winner_comes_first_whichever_image_it_is():
    sides = torch.arange(6.0).view(2, 3, 1)
    labels = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.4]])
    assert winner_first(sides, labels).flatten(1).tolist() == [[0, 4, 2], [3, 1, 5]]


def test_the_discount_is_denserewards(golden, method_recipe, unrolled):
    weights = discounted(1000, 0.9)
    by_step = weights.flip(0).view(50, 20)  # the noisiest first, of a sampler of 50 steps
    raw = golden("methods/case6_dense_reward")["weights/gamma0.9/raw"]
    torch.testing.assert_close(by_step, raw.double()[:, None].expand(50, 20), rtol=1e-5, atol=0)
    assert torch.equal(discounted(1000, 1.0), torch.ones(1000).double())
    method = unrolled(method_recipe("diffusion_dpo", "optim.discount=0.9")).method
    t = method.timesteps(4000)
    share = (t >= 980).double().mean().item()
    expected = 0.1 / (1 - 0.9**50)
    assert abs(share - expected) < 4 * (expected * 0.9 / 4000) ** 0.5
    assert set(range(980, 1000)) <= set(t.tolist())


@pytest.mark.parametrize("predicts, flip", [("epsilon", "independent"), ("v_prediction", "shared")])
def test_a_whole_iteration_is_the_unrolled_one(method_recipe, unrolled, tiny_folder, tmp_path, predicts, flip):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": predicts}))
    keys = (f"model.path={model}", "optim.micro_batch=4", "optim.beta=20", f"data.flip={flip}", "data.drop_prompts=0.5")
    arguments = method_recipe("diffusion_dpo", *unrolled.PLAIN_STEPS, *keys)
    fused, loops = unrolled(arguments), unrolled(arguments)
    before = fused.lora()
    facts, stats = fused.iterate()
    adamw, logits, winners = loops.adamw(), [], []
    for error in loops.pair_errors():
        with loops.policy.reference():
            reference = error(0) - error(1)
        winner = error(0)
        logit = -10 * (winner - error(1) - reference)
        (F.softplus(-logit) / 8).backward()
        logits.append(logit.item())
        winners.append(winner.item())
    adamw.step()
    assert facts == {"prompts": 8, "pairs": 8}
    assert stats["margin"].item() == pytest.approx(sum(logits[4:]) / 4, rel=1e-3)
    assert stats["error"].item() == pytest.approx(sum(winners[4:]) / 4, rel=1e-4)
    assert stats["accuracy"].item() == sum(logit > 0 for logit in logits[4:]) / 4
    fused.check_moved_as(loops, before)


def test_before_the_first_step_no_side_is_preferred(method_recipe, unrolled):
    run = unrolled(method_recipe("diffusion_dpo"), moved=False)
    (batch, *_) = run.method.batches(run.method.collect(0)[0])
    loss, stats = run.method.loss(batch)
    assert (loss.item(), stats["margin"], stats["accuracy"]) == (pytest.approx(math.log(2)), 0, 0.5)


def test_the_rate_warms_up_and_stays(method_recipe, unrolled):
    method = unrolled(method_recipe("diffusion_dpo", "optim.warmup=4", "optim.lr=2")).method
    assert [method.learning_rate(i) for i in (0, 1, 3, 4, 999)] == [0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pairs_of_the_cache_are_those_of_the_images(
    method_recipe, unrolled, pair_files, tmp_path, tiny_folder, tiny_sdxl_folder, family
):
    """But for rounding to float16, flips and emptied prompts included; and then nothing is left to encode with."""
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    keys = (f"data.source={file}", f"model.path={tiny_folder if family == 'sd15' else tiny_sdxl_folder}")
    keys = (*keys, "data.drop_prompts=0.5", "data.train=null", "optim.micro_batch=7")
    live, cached = (
        unrolled(method_recipe("diffusion_dpo", *keys, f"data.cache={cache}")).method
        for cache in ("null", tmp_path / "cache")
    )
    assert (len(live.data.pairs), live.data.ties) == (14, 2)
    a, b = (next(method.batches(method.collect(0)[0])) for method in (live, cached))
    assert torch.equal(a.t, b.t)
    assert torch.equal(a.target, b.target)
    assert 0 < (a.x - b.x).abs().max() < 2e-3 * a.x.abs().max()
    for name in ("text", "pooled") if family == "sdxl" else ("text",):
        torch.testing.assert_close(getattr(a.cond, name), getattr(b.cond, name), rtol=1e-3, atol=1e-3)
        empty = (getattr(b.cond, name) == getattr(cached.empty, name)).flatten(1).all(1)
        assert 0 < empty.sum() < 7
    whole = [[16, 16, 0, 0, 16, 16]] if family == "sdxl" else None
    assert (None if a.cond.time_ids is None else a.cond.time_ids.tolist()) == whole
    assert cached.diffusion.text_encoders == []
    assert len(live.diffusion.text_encoders) == (1 if family == "sd15" else 2)


@pytest.mark.parametrize("form", ["factory", "cached"])
def test_a_resumed_run_has_the_same_bits(method_recipe, pair_files, tmp_path, form):
    keys = ("optim.warmup=3", "optim.discount=0.9")
    if form == "cached":
        file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(9))
        keys = (*keys, f"data.source={file}", "data.train=null", f"data.cache={tmp_path / 'cache'}", "data.workers=1")
    folders = tmp_path / "whole", tmp_path / "parts"
    train.main(method_recipe("diffusion_dpo", *keys, "run.iterations=3", f"run.dir={folders[0]}"))
    train.main(method_recipe("diffusion_dpo", *keys, "run.iterations=2", f"run.dir={folders[1]}"))
    train.main(method_recipe("diffusion_dpo", *keys, "run.iterations=3", "run.resume=true", f"run.dir={folders[1]}"))
    name = "pytorch_lora_weights.safetensors"
    a, b = ((folder / "checkpoints" / "000003" / name).read_bytes() for folder in folders)
    assert a[-2000:] == b[-2000:]


def test_broken_pairs_are_named_once_the_run_folder_is_open(method_recipe, pair_files, tmp_path, capsys):
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    (file.parent / "images" / "3-1.jpg").write_bytes(b"not an image")
    keys = (f"data.source={file}", "data.train=null", "data.max_broken=0.1", "run.iterations=2")
    file, *overrides = method_recipe("diffusion_dpo", *keys)
    with Session.start(load(file, overrides)) as session:
        build(session)
        assert not session.dir.exists()
    train.main(method_recipe("diffusion_dpo", *keys))
    out = capsys.readouterr().out
    assert "13 pairs, 2 ties and 0 other rows left out" in out
    assert "1 broken pairs left out" in out
    assert "pairs.jsonl line 4: images/3-1.jpg" in (tmp_path / "run" / "broken.txt").read_text()
