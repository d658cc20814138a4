"""methods/mapo: its authors' numbers, its loss where errors are 0 or large, and an unrolled iteration."""

import math

import pytest
import torch
import torch.nn.functional as F

from strop.engine import train
from strop.engine.methods.mapo import mapo_loss, score
from strop.engine.methods.offline import errors


@pytest.mark.parametrize("tag, beta, scale", [("default", 0.1, 0.5), ("snr2_beta1", 1.0, 2.0)])
@pytest.mark.parametrize(
    "dtype, mse, loss, gradient", [(torch.float32, 2e-7, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-9, 1e-7)]
)
def test_losses_and_gradients_are_the_authors(golden, tag, beta, scale, dtype, mse, loss, gradient):
    """Beside their float64; the float32 as published loses its digits."""
    case = golden("methods/case4_mapo")
    prediction, target = (case[f"in/{name}"].to(dtype).unflatten(0, (2, 6)) for name in ("model_pred", "target"))
    prediction = prediction.clone().requires_grad_()
    expected = lambda name: case[f"{tag}/f64/{name}"]
    error = errors(prediction, target)
    each = torch.stack([expected("model_losses_w"), expected("model_losses_l")])
    assert (error - each).abs().max() <= mse
    actual, stats = mapo_loss(error, beta, scale)
    assert abs(actual.item() - expected("loss").item()) <= loss * max(1, beta / 0.1)
    ratio = expected("ratio_losses") / beta  # log sigmoid of the logit
    logits = ratio - torch.log(-torch.expm1(ratio))
    assert stats["margin"].item() == pytest.approx(logits.mean().item(), abs=3e-4, rel=1e-5)
    actual.backward()
    exact = expected("grad_model_pred").unflatten(0, (2, 6))
    assert (prediction.grad - exact).norm() <= gradient * exact.norm()


def test_scores_and_their_slopes_are_exact_from_no_error_to_a_large_one():
    """Beside the formula in 40 digits, from its series for small errors."""
    values = [0.0, 1e-12, 1e-6, 1.9e-4, 2.1e-4, 1e-2, 1.0, 30.0, 5000.0]
    error = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    actual = score(error, 0.5)
    actual.sum().backward()

    def truth(x):
        """g(x) = x / (exp(x) - 1) and its derivative."""
        if x < 0.1:
            series = [1.0, -1 / 2, 1 / 12, 0.0, -1 / 720, 0.0, 1 / 30240]
            return sum(c * x**n for n, c in enumerate(series)), sum(
                n * c * x ** (n - 1) for n, c in enumerate(series) if n
            )
        if x > 700:
            return 0.0, 0.0
        return x / math.expm1(x), (math.expm1(x) - x * math.exp(x)) / math.expm1(x) ** 2

    for value, found, slope in zip(values, actual.tolist(), error.grad.tolist(), strict=True):
        assert (found, slope) == (
            pytest.approx(truth(value / 2)[0], rel=1e-12, abs=1e-300),
            pytest.approx(truth(value / 2)[1] / 2, rel=1e-7, abs=1e-300),
        )


def test_the_loss_of_ties_zeros_and_large_errors():
    error = torch.tensor([[0.1, 0.0, 0.0, 4000.0, 0.2], [0.1, 0.0, 0.3, 0.1, 0.1]], requires_grad=True)
    g = lambda error: 1.0 if error == 0 else error / 2 / math.expm1(error / 2) if error < 1000 else 0.0
    logits = [1000 * (g(w) - g(l)) for w, l in error.T.tolist()]
    soft = [math.log1p(math.exp(-x)) if x > -50 else -x for x in logits]
    loss, stats = mapo_loss(error, beta=0.1)
    assert loss.item() == pytest.approx((error[0].sum().item() + 0.1 * sum(soft)) / 5, rel=1e-6)
    assert stats["accuracy"].item() == pytest.approx((0.5 + 0.5 + 1 + 0 + 0) / 5)
    loss.backward()
    assert error.grad.isfinite().all()
    assert error.grad[:, 1].tolist() == pytest.approx([0.2 + 0.1 * 0.5 * 250 / 5, -0.1 * 0.5 * 250 / 5])


def test_a_whole_iteration_is_the_unrolled_one(method_recipe, unrolled):
    keys = ("optim.micro_batch=4", "optim.accumulate=2", "optim.beta=0.3")
    arguments = method_recipe("mapo", *unrolled.PLAIN_STEPS, *keys)
    fused, loops = unrolled(arguments), unrolled(arguments)
    before = fused.lora()
    facts, stats = fused.iterate()
    adamw, logits = loops.adamw(), []
    for error in loops.pair_errors():
        winner, loser = error(0).double(), error(1).double()
        logit = 1000 * (winner / 2 / torch.expm1(winner / 2) - loser / 2 / torch.expm1(loser / 2))
        ((winner - 0.3 * F.logsigmoid(logit)) / 8).backward()
        logits.append(logit.item())
    adamw.step()
    assert facts == {"prompts": 8, "pairs": 8}
    assert stats["margin"].item() == pytest.approx(sum(logits[4:]) / 4, rel=1e-3)
    fused.check_moved_as(loops, before)


@pytest.mark.parametrize("cache", ["null", "{}/cache"])
def test_sdxl_is_told_how_each_image_was_cropped(
    method_recipe, unrolled, pair_files, tmp_path, tiny_sdxl_folder, cache
):
    """Images of 20 x 24 pixels, and winners of 30 x 20, become 16 x 16."""
    rows = [row for row in pair_files.rows(4) if row["label_0"] != 0.5]
    rows = [row | {"jpg_0": pair_files.jpeg(0.5, i, (30, 20)), "label_0": 1.0} for i, row in enumerate(rows)]
    file = pair_files.jsonl(tmp_path / "pairs", rows)
    keys = (f"model.path={tiny_sdxl_folder}", f"data.source={file}", f"data.cache={cache.format(tmp_path)}")
    method = unrolled(method_recipe("mapo", *keys, "data.train=null")).method
    (batch, *_) = method.batches(method.collect(0)[0])
    expected = [[30, 20, 4, 0, 16, 16]] * 4 + [[20, 24, 0, 1, 16, 16]] * 4
    assert batch.cond.time_ids.tolist() == expected
    seen = []
    method.policy.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    method.loss(batch)
    assert [ids.tolist() for ids in seen] == [expected]


def test_a_resumed_run_has_the_same_bits(method_recipe, tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    train.main(method_recipe("mapo", "run.iterations=3", f"run.dir={folders[0]}"))
    train.main(method_recipe("mapo", "run.iterations=2", f"run.dir={folders[1]}"))
    train.main(method_recipe("mapo", "run.iterations=3", "run.resume=true", f"run.dir={folders[1]}"))
    name = "pytorch_lora_weights.safetensors"
    a, b = ((folder / "checkpoints" / "000003" / name).read_bytes() for folder in folders)
    assert a[-2000:] == b[-2000:]
