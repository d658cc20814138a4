"""strop.engine.preference: the golden scores and choices, images to pixels, folders written, read and refused."""

import itertools
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from strop.engine.clip import TimeConditionedCLIP
from strop.engine.errors import UserError
from strop.engine.preference import StepAwarePreferenceModel, pick_pairs

CPU = torch.device("cpu")
SCORES = 1e-5  # two float32 runs, each up to 5e-6 off the float64 one
SIZES = ["48x48", "56x56", "64x64", "64x96", "64x97", "97x64", "112x112"]


@pytest.fixture(scope="module")
def case2(golden):
    return golden("case2_spm_clip")


@pytest.fixture(scope="module")
def judge(spm, tokenizer):
    """The golden preference model."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    return StepAwarePreferenceModel(clip.eval().requires_grad_(False), tokenizer, spm.mean, spm.std)


@pytest.fixture(scope="module")
def text(judge, case2):
    return F.normalize(judge.clip.text_features(case2["in/input_ids"]), dim=-1)


@pytest.fixture
def folder(clip_folder, tmp_path):
    """A copy of the plain CLIP folder, to be spoilt."""
    return shutil.copytree(clip_folder, tmp_path / "judge")


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_published_ones(judge, case2, size):
    found = judge.pixels(case2[f"in/image_{size}_f16"].float())
    torch.testing.assert_close(found, case2[f"spm/{size}/pixel_values"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("precision", ["spm", "spm_f64"])
@pytest.mark.parametrize("size", SIZES)
def test_scores_are_the_published_ones(judge, text, case2, size, precision):
    found = judge.compare(judge.pixels(case2[f"in/image_{size}_f16"].float()), text, case2["in/timesteps"])
    torch.testing.assert_close(found.double(), case2[f"{precision}/{size}/scores"].double(), rtol=0, atol=SCORES)


@pytest.mark.parametrize("t", [0, 1, 501, 951])
def test_scores_at_one_timestep_are_the_published_ones(judge, text, case2, t):
    found = judge.score(case2["in/image_64x64_f16"].float().unsqueeze(0), text, t)
    torch.testing.assert_close(found, case2[f"spm/64x64_allt{t}/scores"].unsqueeze(0), rtol=0, atol=SCORES)


def test_scores_of_branches_are_the_published_ones(judge, text, case2):
    """Two branches of four prompts: the images and their mirror images."""
    image = case2["in/image_64x64_f16"].float()
    found = judge.score(torch.stack([image, image.flip(-1)]), text, 501)
    expected = case2["spm/k2b4_64x64_and_hflip_t501/scores"].view(2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=SCORES)


def test_score_is_compare_branch_by_branch(judge, text, case2):
    image = case2["in/image_64x97_f16"].float()
    branches = torch.stack([image, image.flip(-1), 0.5 * image])
    found = judge.score(branches, text, 451)
    assert found.shape == (3, 4)
    for k in range(3):
        expected = judge.compare(judge.pixels(branches[k]), text, torch.tensor([451]))
        torch.testing.assert_close(found[k], expected, rtol=0, atol=SCORES)


def test_half_images_are_widened_before_they_are_resized(judge, case2):
    image = case2["in/image_64x96_f16"]
    assert torch.equal(judge.pixels(image), judge.pixels(image.float()))


@pytest.mark.parametrize("side, left", [(57, 0), (85, 14), (87, 16), (89, 16)])
def test_the_crop_is_centred_and_rounded_half_to_even(judge, side, left):
    """At a short side of 56 nothing is resized, so the pixels are those of the image."""
    image = torch.linspace(-1, 1, side).expand(1, 3, 56, side)
    kept = judge.pixels(image) * judge.std + judge.mean
    torch.testing.assert_close(kept, image[..., left : left + 56] / 2 + 0.5, rtol=0, atol=1e-6)
    kept = judge.pixels(image.mT) * judge.std + judge.mean
    torch.testing.assert_close(kept, image.mT[..., left : left + 56, :] / 2 + 0.5, rtol=0, atol=1e-6)


def test_compare_carries_gradients_to_the_pixels(judge, text, case2):
    pixels = case2["in/pixel_values"].clone().requires_grad_()
    judge.compare(pixels, text, case2["in/timesteps"])[2].backward()
    assert pixels.grad[2].abs().max() > 0
    assert not pixels.grad[[0, 1, 3]].any()


def test_prompts_are_encoded_to_unit_features_padded_and_cut(judge):
    prompts = ["a red dog", "", "an extraordinarily long prompt of many letters"]
    ids = torch.tensor([[0, 27, 18, 5, 30, 4, 15, 33, *[63] * 8], [0, *[63] * 15]])
    found = judge.encode(prompts)
    assert found.shape == (3, 32)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    expected = F.normalize(judge.clip.text_features(ids), dim=-1)
    torch.testing.assert_close(found[:2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0, 501, 999])
@torch.no_grad()
def test_a_plain_clip_folder_is_a_judge_that_ignores_the_timestep(clip_folder, case2, t):
    judge = StepAwarePreferenceModel.load(str(clip_folder), CPU)
    loaded = CLIPModel.from_pretrained(clip_folder)
    plain = CLIPModel(loaded.config).eval()  # a copy: the mapped file's alignment changes the last bits of a matmul
    plain.load_state_dict(loaded.state_dict())
    pixels = case2["in/pixel_values"]
    expected = plain.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(judge.clip.image_features(pixels, torch.tensor([t])), expected)
    ids = judge.tokenizer(["a red dog"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    expected = F.normalize(plain.get_text_features(input_ids=ids).pooler_output, dim=-1)
    assert torch.equal(judge.encode(["a red dog"]), expected)


def test_a_loaded_judge_is_frozen(clip_folder):
    judge = StepAwarePreferenceModel.load(str(clip_folder), CPU)
    assert not judge.clip.training
    assert not any(p.requires_grad for p in judge.clip.parameters())


def test_saved_and_loaded_it_scores_the_same(judge, text, case2, spm, tmp_path):
    judge.save(tmp_path / "runs" / "judge")
    again = StepAwarePreferenceModel.load(str(tmp_path / "runs" / "judge"), CPU)
    image = case2["in/image_64x97_f16"].float().unsqueeze(0)
    assert torch.equal(again.score(image, text, 251), judge.score(image, text, 251))
    assert torch.equal(again.encode(["a red dog"]), judge.encode(["a red dog"]))
    state = again.clip.state_dict()
    assert state.keys() == spm.state.keys()
    assert all(torch.equal(state[name], value) for name, value in spm.state.items())
    assert again.mean.flatten().tolist() == pytest.approx(spm.mean)
    assert again.std.flatten().tolist() == pytest.approx(spm.std)


def test_a_half_precision_checkpoint_is_loaded_in_float32(folder):
    state = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, folder / "model.safetensors")
    judge = StepAwarePreferenceModel.load(str(folder), CPU)
    assert {p.dtype for p in judge.clip.parameters()} == {torch.float32}
    assert torch.equal(judge.clip.visual_projection.weight, state["visual_projection.weight"].half().float())


def test_position_ids_of_older_checkpoints_are_ignored(folder):
    state = load_file(folder / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17).unsqueeze(0)
    save_file(state, folder / "model.safetensors")
    StepAwarePreferenceModel.load(str(folder), CPU)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda state: state.pop("visual_projection.weight"), "visual_projection.weight"),
        (lambda state: state.update(stranger=torch.zeros(1)), "stranger"),
        (lambda state: state.update({"t_embedder.mlp.0.bias": torch.zeros(64)}), "t_embedder.mlp.2.weight"),
        (lambda state: state.update({"visual_projection.weight": torch.zeros(2, 2)}), "visual_projection.weight"),
    ],
    ids=["missing", "unexpected", "half-a-modulation", "wrong-shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(folder, spoil, named):
    state = load_file(folder / "model.safetensors")
    spoil(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"^judge\.path: ") as refusal:
        StepAwarePreferenceModel.load(str(folder), CPU)
    assert named in str(refusal.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^judge\.path: .*nowhere has no config\.json"):
        StepAwarePreferenceModel.load(str(tmp_path / "nowhere"), CPU)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^judge\.path: .*model\.safetensors"):
        StepAwarePreferenceModel.load(str(folder), CPU)


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        pytest.param("model.safetensors", "no tensors"),
        pytest.param("preprocessor_config.json", "{"),
    ],
)
def test_a_broken_file_is_refused(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=r"^judge\.path: "):
        StepAwarePreferenceModel.load(str(folder), CPU)


def test_another_kind_of_model_is_refused(tiny_folder):
    with pytest.raises(UserError, match=r"^judge\.path: "):
        StepAwarePreferenceModel.load(str(tiny_folder / "unet"), CPU)


@pytest.mark.parametrize("threshold", [0.3, 0.4])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_choices_are_the_published_ones(golden, k, threshold):
    case3 = golden("case3_compare")
    scores = case3[f"k{k}/scores"]
    branches = torch.arange(k * 6.0).view(k, 6, 1, 1, 1)  # branch j of prompt i holds 6 j + i
    x_t = -torch.arange(6.0).view(6, 1, 1, 1)
    pairs, sure = pick_pairs(x_t, branches, scores, step=7, threshold=threshold)
    indices = case3[f"k{k}/thr{threshold}/indices"]
    assert torch.equal(pairs.x_prev.flatten(1), 6.0 * indices + torch.arange(6))
    assert torch.equal(pairs.x_t, x_t.unsqueeze(0))
    assert pairs.step.tolist() == [7] * 6
    assert pairs.prompt.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(sure, case3[f"k{k}/thr{threshold}/valid"])


def test_golden_choices_are_of_both_kinds(golden):
    """Otherwise the agreement above would say nothing about the threshold."""
    case3 = golden("case3_compare")
    for k, threshold in itertools.product((2, 4, 8), (0.3, 0.4)):
        assert case3[f"k{k}/thr{threshold}/indices"].shape == (2, 6)
    valid = torch.cat([case3[f"k{k}/thr{threshold}/valid"] for k in (2, 4, 8) for threshold in (0.3, 0.4)])
    assert valid.any()
    assert not valid.all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_the_threshold_is_one_of_probability(threshold):
    """A pair just above the threshold is kept, one just below is not, and equal scores never."""
    edge = 2 * math.atanh(threshold)
    gap = torch.tensor([edge + 1e-5, edge - 1e-5, 0.0], dtype=torch.float64)
    scores = torch.stack([torch.full_like(gap, 20.0), 20.0 + gap])
    _, sure = pick_pairs(torch.zeros(3, 1, 1, 1), torch.zeros(2, 3, 1, 1, 1), scores, 0, threshold)
    difference = torch.softmax(torch.stack([scores.amax(0), scores.amin(0)]), 0).diff(dim=0).neg().squeeze(0)
    assert sure.tolist() == (difference > threshold).tolist()
    assert sure.tolist()[0]
    assert not sure.tolist()[2]


def test_saved_settings_are_what_other_tools_expect(judge, tmp_path):
    judge.save(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["size"] == 56
    assert CLIPModel.config_class.from_pretrained(tmp_path).vision_config.hidden_size == 64
