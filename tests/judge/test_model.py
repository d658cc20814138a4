"""judge/model: the golden scores and choices, images to pixels, kinds of judge, what a judge keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from strop.engine.config.training import JudgeConfig
from strop.engine.judge import model as preference
from strop.engine.judge.candidates import Candidates
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.conditioning import Conditioning

CPU = torch.device("cpu")
SCORES = 1e-5  # two float32 runs, each up to 5e-6 off the float64 one
SIZES = ["48x48", "56x56", "64x64", "64x96", "64x97", "97x64", "112x112"]


@pytest.fixture(scope="module")
def case2(golden):
    return golden("case2_spm_clip")


@pytest.fixture(scope="module")
def judge(spm, tokenizer):
    return golden_judge(spm, tokenizer)


def golden_judge(spm, tokenizer):
    """The golden preference model."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    return StepAwarePreferenceModel(clip.freeze(), tokenizer, spm.mean, spm.std)


@pytest.fixture(scope="module")
def text(judge, case2):
    return F.normalize(judge.clip.text_features(case2["in/input_ids"]), dim=-1)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_scores_are_the_published_ones(judge, text, case2, size):
    pixels = judge.pixels(case2[f"in/image_{size}_f16"].float())
    torch.testing.assert_close(pixels, case2[f"spm/{size}/pixel_values"], rtol=0, atol=2e-6)
    scores = judge.compare(pixels, text, case2["in/timesteps"]).double()
    for precision in ("spm", "spm_f64"):
        torch.testing.assert_close(scores, case2[f"{precision}/{size}/scores"].double(), rtol=0, atol=SCORES)


@pytest.mark.parametrize("t", [0, 1, 501, 951])
def test_scores_at_one_timestep_are_the_published_ones(judge, text, case2, t):
    actual = judge.score_images(case2["in/image_64x64_f16"].float().unsqueeze(0), text, t)
    torch.testing.assert_close(actual, case2[f"spm/64x64_allt{t}/scores"].unsqueeze(0), rtol=0, atol=SCORES)


def test_scores_of_branches_are_the_published_ones(judge, text, case2):
    """Two branches of four prompts, the images and their mirror images, as candidates have them."""
    image = case2["in/image_64x64_f16"].float()
    branches, latents = torch.stack([image, image.flip(-1)]), torch.zeros(2, 4, 4, 8, 8)
    candidates = Candidates(latents, 501, 551, lambda prompts: (None, latents), lambda x0_hat: branches)
    cond = Conditioning(text=torch.zeros(4, 1, 1), null=torch.zeros(1, 1, 1), judge=text)
    expected = case2["spm/k2b4_64x64_and_hflip_t501/scores"].view(2, 4)
    torch.testing.assert_close(judge.score(candidates, cond), expected, rtol=0, atol=SCORES)


def test_half_images_are_resized_in_half_precision_as_published(judge, text, case2):
    image = case2["in/image_64x96_f16"]
    assert image.dtype == torch.float16
    actual = judge.pixels(image)
    torch.testing.assert_close(actual, case2["spm/64x96_fp16input/pixel_values"], rtol=0, atol=2e-6)
    scores = judge.compare(actual, text, case2["in/timesteps"])
    torch.testing.assert_close(scores, case2["spm/64x96_fp16input/scores"], rtol=0, atol=SCORES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_images_of_other_types_are_resized_in_float32(judge, case2, dtype):
    image = case2["in/image_64x96_f16"].to(dtype)
    assert torch.equal(judge.pixels(image), judge.pixels(image.float()))


@pytest.mark.parametrize("size", [(1024, 1024), (768, 1344)], ids=str)
def test_nothing_overflows_in_half_images_of_full_size(judge, text, size):
    """White, black and values past the ends, as a decoder gives them."""
    image = torch.empty(1, 1, 3, *size).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).sign() * 1.2
    actual = judge.score_images(image.half(), text[:1], 1)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, judge.score_images(image, text[:1], 1), rtol=0, atol=0.02)


@pytest.mark.parametrize("side, left", [(57, 0), (85, 14), (87, 16), (89, 16)])
def test_the_crop_is_centred_and_rounded_half_to_even(judge, side, left):
    """At a short side of 56 nothing is resized, so the pixels are those of the image."""
    image = torch.linspace(-1, 1, side).expand(1, 3, 56, side)
    cropped = judge.pixels(image) * judge.std + judge.mean
    torch.testing.assert_close(cropped, image[..., left : left + 56] / 2 + 0.5, rtol=0, atol=1e-6)
    cropped = judge.pixels(image.mT) * judge.std + judge.mean
    torch.testing.assert_close(cropped, image.mT[..., left : left + 56, :] / 2 + 0.5, rtol=0, atol=1e-6)


def test_compare_carries_gradients_to_the_pixels(judge, text, case2):
    pixels = case2["in/pixel_values"].clone().requires_grad_()
    judge.compare(pixels, text, case2["in/timesteps"])[2].backward()
    assert pixels.grad[2].abs().max() > 0
    assert not pixels.grad[[0, 1, 3]].any()


def test_prompts_are_encoded_to_unit_features_padded_and_cut(judge):
    prompts = ["a red dog", "", "an extraordinarily long prompt of many letters"]
    ids = torch.tensor([[0, 27, 18, 5, 30, 4, 15, 33, *[63] * 8], [0, *[63] * 15]])
    actual = judge.encode(prompts)
    assert actual.shape == (3, 32)
    torch.testing.assert_close(actual.norm(dim=-1), torch.ones(3))
    expected = F.normalize(judge.clip.text_features(ids), dim=-1)
    torch.testing.assert_close(actual[:2], expected, rtol=0, atol=1e-6)


def test_many_prompts_are_encoded_in_parts(judge, monkeypatch):
    prompts = ["a red dog", "b", "a c", "dog", "red"]
    whole = judge.encode(prompts)
    parts = []
    monkeypatch.setattr(preference, "ENCODE_BATCH", 2)
    with judge.clip.text_model.register_forward_pre_hook(
        lambda module, args, options: parts.append(len(options["input_ids"])), with_kwargs=True
    ):
        torch.testing.assert_close(judge.encode(prompts), whole, rtol=0, atol=1e-6)
    assert parts == [2, 2, 1]


def test_without_its_text_tower_a_judge_still_scores(judge, text, case2, tmp_path):
    freed = copy.deepcopy(judge)
    size = sum(p.numel() for p in judge.clip.parameters())
    freed.release_text_tower()
    left = sum(p.numel() for p in freed.clip.parameters())
    text_tower = [judge.clip.text_model, judge.clip.text_projection]
    assert size - left == sum(p.numel() for module in text_tower for p in module.parameters())
    image = case2["in/image_64x64_f16"].unsqueeze(0)
    assert torch.equal(freed.score_images(image, text, 501), judge.score_images(image, text, 501))
    with pytest.raises(RuntimeError, match="asked for text features"):
        freed.encode(["a"])
    with pytest.raises(RuntimeError, match="saved"):
        freed.save(tmp_path / "judge")
    assert not (tmp_path / "judge").exists()


def test_scoring_embeds_each_timestep_once(judge, text, case2):
    """And gives the bits of the path that keeps nothing. The t of a flow is no whole number."""
    fresh = copy.deepcopy(judge)
    image = case2["in/image_64x96_f16"].unsqueeze(0)
    embedded = []
    fresh.clip.t_embedder.register_forward_pre_hook(lambda module, args: embedded.append(args[0].tolist()))
    for t in (951, 501, 501, 951, 0, 0.5, 501.0):
        actual = fresh.score_images(image, text, t)
        assert torch.equal(actual[0], judge.compare(judge.pixels(image[0]), text, torch.tensor([t])))
    assert embedded == [[951], [501], [0], [0.5]]


def test_a_judge_never_told_the_timestep_scores_all_alike_and_trains_its_modulation(judge, text, case2):
    """In scoring and in training, where t comes as a tensor."""
    stepless = copy.deepcopy(judge)
    stepless.kind = "spm_no_step"
    image = case2["in/image_64x96_f16"].unsqueeze(0)
    expected = judge.score_images(image, text, 0)
    for t in (0, 501, 951):
        assert torch.equal(stepless.score_images(image, text, t), expected)
    pixels = judge.pixels(image[0])
    assert torch.equal(stepless.compare(pixels, text, case2["in/timesteps"]), expected[0])
    assert not torch.equal(judge.compare(pixels, text, case2["in/timesteps"]), expected[0])
    stepless.clip.requires_grad_(True).train()
    stepless.compare(case2["in/pixel_values"], text, case2["in/timesteps"]).sum().backward()
    assert stepless.clip.t_embedder.mlp[2].weight.grad.any()
    assert stepless.clip.vision_model.adaLN_modulation[1].weight.grad.any()


@pytest.mark.parametrize("t", [0, 999])
def test_a_loaded_clip_is_frozen_and_scores_as_transformers_does_at_every_timestep(clip_folder, spm, text, case2, t):
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore"), CPU)
    plain = CLIPModel(spm.config).eval()
    plain.load_state_dict(spm.plain)
    with torch.no_grad():
        image = F.normalize(plain.get_image_features(pixel_values=case2["in/pixel_values"]).pooler_output, dim=-1)
        expected = plain.logit_scale.exp() * (image * text).sum(-1)
        assert torch.equal(judge.compare(case2["in/pixel_values"], text, torch.tensor([t])), expected)
        assert torch.equal(judge.compare(case2["in/pixel_values"], text, t), expected)
    assert not judge.clip.training
    assert not any(p.requires_grad for p in judge.clip.parameters())
    assert {p.dtype for p in judge.clip.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype, off", [("float16", 0.1), ("bfloat16", 1.0)])
def test_in_half_precision_scores_stay_in_float32_and_near(judge, clip_folder, text, case2, dtype, off):
    """Scores are cosines times a hundred; the scale itself is not rounded."""
    half = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore", dtype=dtype), CPU)
    scale, types = half.clip.logit_scale, {p.dtype for name, p in half.clip.named_parameters() if "scale" not in name}
    assert types == {getattr(torch, dtype)}
    assert torch.equal(scale, judge.clip.logit_scale)
    assert half.encode(["a"]).dtype == torch.float32
    modulated = copy.deepcopy(judge)
    modulated.clip.cast(getattr(torch, dtype))
    for t in (0, 951):
        scores = modulated.compare(case2["in/pixel_values"], text, t)
        error = (scores - judge.compare(case2["in/pixel_values"], text, t)).abs().max()
        assert scores.dtype == torch.float32
        assert 0 < error < off


def test_saved_and_loaded_it_scores_the_same(judge, text, case2, tmp_path):
    trained = copy.deepcopy(judge)
    trained.kind = "spm_no_step"
    trained.save(tmp_path / "runs" / "judge")
    again = StepAwarePreferenceModel.load(JudgeConfig(path=str(tmp_path / "runs" / "judge"), kind="spm_no_step"), CPU)
    image = case2["in/image_64x97_f16"].float().unsqueeze(0)
    assert torch.equal(again.score_images(image, text, 251), trained.score_images(image, text, 251))
    assert torch.equal(again.encode(["a red dog"]), trained.encode(["a red dog"]))
