"""Training of the judge, its parts: agreement with the published code on noising, x0_hat, loss and a whole step."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPModel

from strop.engine.config.training import ModelConfig
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.denoiser import Denoiser
from strop.engine.judge.loss import agreement, example_weights, preference_loss, preference_scores
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.judge.pixels import training_pixels
from strop.engine.models.base_model import load_unet
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.ranks import Ranks

GOLDEN = Path(__file__).parents[1] / "golden"
ALONE = Ranks(0, 1, torch.device("cpu"))


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", [10, 100])
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_loss_and_gradients_are_those_published(golden, scale, precision):
    case, dtype = golden("case4_spm_criterion"), {"f32": torch.float32, "f64": torch.float64}[precision]
    actual, stats = criterion(case, scale, dtype)
    tolerance = 2e-5 if precision == "f32" else 2e-7  # the weights are float32 here
    assert len(actual) == 5
    for name, value in actual.items():
        assert relative(value, case[f"{precision}/neg0/scale{scale}/{name}"]) < tolerance, name
    assert stats["decided"] == (case["in/label_0"] != 0.5).sum()


def criterion(case, scale, dtype):
    """The recorded batch of case 4 under our loss: (loss and gradients by their recorded names, stats)."""
    names = ("image_0", "image_1", "text")
    raw = [case[f"in/raw_{name}_features"].clone().to(dtype).requires_grad_() for name in names]
    log_scale = torch.tensor(float(scale), dtype=dtype).log().requires_grad_()
    *images, text = (F.normalize(features, dim=-1) for features in raw)
    scores = log_scale.exp() * (torch.stack(images) * text).sum(-1)
    labels = torch.stack([case["in/label_0"], case["in/label_1"]]).to(dtype)
    loss, stats = preference_loss(scores, labels, example_weights(case["in/num_examples_per_prompt"], ALONE).to(dtype))
    loss.backward()
    grads = {f"grad_raw_{name}_features": features.grad for name, features in zip(names, raw, strict=True)}
    return {"loss": loss.detach(), "grad_log_logit_scale": log_scale.grad} | grads, stats


def half_of_case4(rank, folder):
    """One of two ranks: rows 0..3 or 4..5 of the recorded batch; leaves its loss and the gradient of its text."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    case = load_file(GOLDEN / "case4_spm_criterion.safetensors")
    text = case["in/raw_text_features"][rows].requires_grad_()
    images = torch.stack([F.normalize(case[f"in/raw_image_{side}_features"][rows], dim=-1) for side in (0, 1)])
    labels = torch.stack([case["in/label_0"], case["in/label_1"]])[:, rows]
    weights = example_weights(case["in/num_examples_per_prompt"][rows], Ranks(rank, 2, torch.device("cpu")))
    loss, _ = preference_loss(10 * (images * F.normalize(text, dim=-1)).sum(-1), labels, weights)
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": text.grad}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_average_to_the_loss_of_the_whole_batch(golden, tmp_path):
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(100) for process in started] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    case = golden("case4_spm_criterion")
    assert relative((ranks[0]["loss"] + ranks[1]["loss"]) / 2, case["f32/neg0/scale10/loss"]) < 1e-5
    grad = torch.cat([ranks[0]["grad"], ranks[1]["grad"]]) / 2
    assert relative(grad, case["f32/neg0/scale10/grad_raw_text_features"]) < 1e-5


def test_a_tie_costs_nothing_at_equal_scores_and_pulls_them_together():
    scores = torch.tensor([[1.0, 3.0], [1.0, 1.0]], requires_grad=True)
    loss, stats = preference_loss(scores, torch.full((2, 2), 0.5), torch.tensor([0.5, 0.5]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(math.cosh(1)), abs=1e-6)  # scores 2 apart
    assert scores.grad[:, 0].tolist() == [0, 0]
    assert scores.grad[0, 1] > 0 > scores.grad[1, 1]
    assert (stats["decided"], stats["accuracy"]) == (0, 0)


def test_agreement_leaves_ties_out_and_counts_equal_scores_as_wrong():
    scores = torch.tensor([[1.0, 0.0, 5.0, 2.0], [0.0, 1.0, 0.0, 2.0]])
    labels = torch.tensor([[1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.5, 1.0]])
    right, decided = agreement(scores, labels)
    assert (right, decided) == (1, 3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_x0_hat_are_those_published(golden, diffusion, prediction):
    case = golden("case5_batchable_ddim")
    denoiser = denoiser_of(diffusion, prediction)
    t = case["in/timesteps"]
    assert [denoiser.schedule.t[step] for step in (999 - t).tolist()] == t.tolist()
    noisy = denoiser.add_noise(case["in/clean_latents"], case["in/noise"], t)
    assert (noisy - case[f"f32/{prediction}/noisy"]).abs().max() < 1e-6
    expected = case[f"f32/{prediction}/noisy"]
    x0_hat = denoiser.x0_hat(expected, case["in/model_output"].unsqueeze(0), t)
    assert relative(x0_hat, case[f"f32/{prediction}/pred_original_sample"]) < 1e-6
    if prediction == "epsilon":
        rows = (x0_hat - case["f64/epsilon/pred_original_sample"]).flatten(1).norm(dim=1)
        assert (rows / case["f64/epsilon/pred_original_sample"].flatten(1).norm(dim=1)).max() < 2e-6


def denoiser_of(diffusion, prediction):
    scheduler = DDIMScheduler.from_config(diffusion.scheduler.config, prediction_type=prediction)
    base = SimpleNamespace(scheduler=scheduler, device=torch.device("cpu"))
    return Denoiser(base, torch.nn.Identity(), guidance=1.0)


def one_step(golden, tiny_folder, diffusion, spm, monkeypatch):
    """The recorded training step: (denoised images, pixels, loss, gradients by name), with the recorded draws."""
    case = golden("case5b_spm_train_step_sd15")
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    judge = StepAwarePreferenceModel(TimeConditionedCLIP(CLIPModel(spm.config)), None, spm.mean, spm.std)
    judge.clip.load_state_dict(spm.state)
    judge.clip.train()
    draws = [torch.cat([case["rand/1_vae_noise"], case["rand/2_vae_noise"]]), case["rand/3_latent_noise"]]
    empty = torch.tensor([[61] + [63] * 15])
    images = torch.stack([case["in/pixel_values_0"], case["in/pixel_values_1"]])
    t = case["rand/0_timesteps"]

    states = diffusion.text_encoders[0](torch.cat([case["in/sdv15_input_ids"], empty])).last_hidden_state.detach()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: draws.pop(0))
        shown = Denoiser(diffusion, unet, guidance=5.0)(images, Conditioning(states[:-1], states[-1:]), t, None)
    pixels = training_pixels(judge, shown)
    text = F.normalize(judge.clip.text_features(case["in/input_ids"]), dim=-1)
    labels = torch.stack([case["in/label_0"], case["in/label_1"]])
    weights = example_weights(case["in/num_example_per_prompt"], ALONE)
    loss, _ = preference_loss(preference_scores(judge, pixels, text, t), labels, weights)
    loss.backward()
    return shown, pixels, loss, {name: p.grad for name, p in judge.clip.named_parameters()}


def test_a_whole_step_is_the_one_published(golden, tiny_folder, diffusion, spm, monkeypatch):
    case = golden("case5b_spm_train_step_sd15")
    shown, pixels, loss, grads = one_step(golden, tiny_folder, diffusion, spm, monkeypatch)
    for side in (0, 1):
        assert (shown[side] - case[f"x0hat_decoded_image_{side}"]).abs().max() < 2e-5
        assert (pixels[side] - case[f"model_pixel_values_{side}"]).abs().max() < 1e-4
    assert (loss - case["loss"]).abs() < 5e-6
    recorded = {name.removeprefix("grad/model."): value for name, value in case.items() if name.startswith("grad/")}
    assert len(recorded) == 10
    assert [name for name, value in recorded.items() if relative(grads[name], value) > 2e-4] == []
    assert all(grad is not None for grad in grads.values())
    norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
    assert relative(norm, case["grad_norm_all_params"]) < 1e-4


def test_sdxl_is_shown_as_diffusers_would_show_it(tiny_sdxl_folder):
    model = ModelConfig(path=str(tiny_sdxl_folder))
    diffusion = LatentDiffusion.load(model, ALONE.device)
    images = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts, t = ["a cat", "a dog", "ab"], torch.tensor([0, 501, 951])
    denoiser = Denoiser(diffusion, load_unet(model, ALONE.device), guidance=5.0)
    shown = denoiser(images, diffusion.encode(prompts), t, torch.Generator().manual_seed(2))

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    rng, vae = torch.Generator().manual_seed(2), pipeline.vae
    sampled = torch.randn(6, 4, 8, 8, generator=rng).view(2, 3, 4, 8, 8)
    noise = torch.randn(3, 4, 8, 8, generator=rng)
    text, null, pooled, null_pooled = pipeline.encode_prompt(prompts, device=ALONE.device, num_images_per_prompt=1)
    added = {"text_embeds": torch.cat([null_pooled, pooled]), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 6)}
    a = pipeline.scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
    with torch.no_grad():
        for side in (0, 1):
            posterior = vae.encode(images[side]).latent_dist
            latents = (posterior.mean + posterior.std * sampled[side]) * vae.config.scaling_factor
            x = a.sqrt() * latents + (1 - a).sqrt() * noise
            out = pipeline.unet(torch.cat([x, x]), t.repeat(2), torch.cat([null, text]), added_cond_kwargs=added).sample
            eps = out[:3] + 5.0 * (out[3:] - out[:3])
            expected = vae.decode((x - (1 - a).sqrt() * eps) / a.sqrt() / vae.config.scaling_factor).sample
            assert relative(shown[side], expected) < 1e-5


def test_training_pixels_squash_to_a_square_and_clamp_first(spm):
    judge = StepAwarePreferenceModel(TimeConditionedCLIP(CLIPModel(spm.config)), None, spm.mean, spm.std)
    square = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    same = judge.pixels(square.flatten(0, 1)).view(2, 3, 3, 56, 56)
    assert (training_pixels(judge, square) - same).abs().max() < 1e-5
    assert training_pixels(judge, square[..., :40]).shape == same.shape
    bright = training_pixels(judge, torch.full((1, 1, 3, 8, 8), 1.5))
    assert (bright * judge.std + judge.mean).allclose(torch.tensor(1.0))


if __name__ == "__main__":
    half_of_case4(int(sys.argv[1]), Path(sys.argv[2]))
