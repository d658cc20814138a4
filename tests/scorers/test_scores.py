"""scorers: pixels, tokens and scores beside those of the published packages (tests/golden/README.md)."""

import functools
import io
import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from strop.engine.config.training import JudgeConfig
from strop.engine.judge import files as judge_files
from strop.engine.scorers import find
from strop.engine.scorers.clip import LoadedCLIP
from strop.engine.scorers.hpsv2 import cleaned, pixels_of
from strop.engine.scorers.pickscore import PickScore
from strop.engine.scorers.pixels import hugging_face, openai
from strop.engine.scorers.scorer import Options

EVAL = Path(__file__).parents[1] / "golden" / "eval"
FILES = {  # weights and components
    "pickscore": (EVAL / "pick", EVAL / "tokenizer"),
    "hpsv2": (EVAL / "hps" / "HPS_v2_tiny.pt", EVAL / "tokenizer"),
    "hpsv2.1": (EVAL / "hps" / "HPS_v2.1_tiny.pt", EVAL / "tokenizer"),
    "image_reward": (EVAL / "imagereward" / "ImageReward_tiny.pt", EVAL / "imagereward"),
    "clip_score": (EVAL / "clip", EVAL / "tokenizer"),
}
RECORDED = {  # name of the scores, ours over theirs, largest error (that of two float32 runs)
    "pickscore": ("scores", 1, 2e-4),
    "hpsv2": ("cos", 100, 3e-4),
    "hpsv2.1": ("cos", 100, 3e-4),
    "image_reward": ("score", 1, 5e-5),
    "aesthetic": ("score", 1, 2e-5),
    "clip_score": ("matrix", 1, 5e-5),
}
FINE = 1e-5  # and relative to the 2-norm of all scores


@functools.cache
def golden():
    return load_file(EVAL / "scores.safetensors")


def prompts():
    """Plain; curly quotes, a dash, accents, an emoji; entities, Cyrillic and Kanji; over-long; empty; odd blanks."""
    return json.loads((EVAL / "prompts.json").read_text(encoding="utf-8"))


def images():
    """RGB 64x64, greyscale 96x64, RGB 64x97, 224x224 and 512x300, RGBA 80x60."""
    return [Image.open(io.BytesIO(golden()[f"png/{i}"].numpy().tobytes())) for i in range(6)]


def linear_head():
    """A head in its authors' layers, that is the recorded affine map: through the first unit of each layer."""
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    for number, (wide, narrow) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        weight = torch.zeros(narrow, wide)
        weight[0, 0] = 1
        state |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": torch.zeros(narrow)}
    state["layers.0.weight"][0] = golden()["aesthetic/f64/affine_weight"]
    state["layers.7.bias"][:] = golden()["aesthetic/f64/affine_bias"]
    return state


@functools.cache
def scorer(name, dtype=torch.float32, batch=16):
    options = Options(dtype=dtype, batch=batch)
    if name != "aesthetic":
        return find.load(name, *map(str, FILES[name]), options)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(linear_head(), Path(folder) / "head.pth")
        clip = Path(folder) / "clip"
        clip.mkdir()
        for file in (*(EVAL / "clip").iterdir(), *(EVAL / "tokenizer").iterdir()):
            (clip / file.name).symlink_to(file)
        return find.load(name, f"{folder}/head.pth", str(clip), options)


def matrix(name):
    """Scores [prompt, image], of the aesthetic head (6,)."""
    if name == "aesthetic":
        return scorer(name)(images(), prompts())[name]
    pairs = [(image, prompt) for prompt in prompts() for image in images()]
    (found,) = scorer(name)(*zip(*pairs, strict=True)).values()
    return found.view(6, 6)


def recorded(name, precision):
    key, factor, _ = RECORDED[name]
    scores = golden()[f"{name}/{precision}/{key}"] * factor
    return scores.clamp(min=0) if name == "clip_score" else scores


@pytest.mark.parametrize("name", RECORDED)
def test_scores(name):
    found = matrix(name)
    for precision in ("f32", "f64"):
        expected = recorded(name, precision).double()
        assert_close(found.double(), expected, rtol=0, atol=RECORDED[name][2])
        assert (found - expected).norm() <= FINE * expected.norm()


@pytest.mark.parametrize("name", RECORDED)
def test_scores_in_float64(name):
    """Of prompt i and image i. The aesthetic head is stored in float32 here, the recorded map is not."""
    found, expected = scorer(name, torch.float64)(images(), prompts())[name], recorded(name, "f64")
    assert found.dtype == torch.float64
    expected = expected if name == "aesthetic" else expected.diag()
    assert_close(found, expected, rtol=1e-6 if name == "aesthetic" else 1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RECORDED)
def test_the_size_of_a_batch_and_half_precision_only_round(name):
    """Pixels and the score itself stay in float32."""
    expected = scorer(name)(images(), prompts())[name]
    for found in (scorer(name, batch=1), scorer(name, batch=4)):
        assert_close(found(images(), prompts())[name], expected, rtol=1e-6, atol=RECORDED[name][2] / 10)
    found = scorer(name, torch.bfloat16)(images(), prompts())[name]
    assert found.dtype == torch.float32
    assert 1e-6 < (found - expected).norm() / expected.norm() < 0.1


def test_scores_for_one_call_of_clip_score():
    """The published number of a pair is clamped; that of a longer prompt comes without its end token."""
    found = scorer("clip_score")(images(), prompts())["clip_score"]
    assert_close(found, golden()["clip_score/f32/single"], rtol=0, atol=5e-5)


def normalised(pixels, clip):
    """pixels: images (N, 3, H, W) in [0, 1]."""
    return (pixels - torch.tensor(clip.mean).view(3, 1, 1)) / torch.tensor(clip.std).view(3, 1, 1)


def found_bytes():
    """What the vision towers see of the images, by the name under which the published bytes are recorded."""
    return {
        "pickscore/pixels_u8": torch.stack([hugging_face(image, 56) for image in images()]),
        "aesthetic/pixels_u8": torch.stack([openai(image, 56) for image in images()]),
        "image_reward/pixels_u8_4_5": torch.stack([openai(image, 224) for image in images()[4:]]),
    }


def test_pixels():
    for name, found in found_bytes().items():
        assert torch.equal(found, golden()[name]), name
    clip = scorer("pickscore").clip
    expected = normalised(golden()["pickscore/pixels_u8"] / 255, clip)
    assert_close(clip.pixels(images(), hugging_face), expected, rtol=0, atol=1e-6)


def hps_pixels():
    """Of images 2, 4 and 5, normalised."""
    return normalised(torch.stack([pixels_of(images()[i], 84) for i in (2, 4, 5)]), scorer("hpsv2").clip)


def test_pixels_of_hps():
    assert_close(hps_pixels(), golden()["hpsv2/pixels_2_4_5"], rtol=0, atol=1e-5)


def test_an_image_that_fits_hps_is_padded_and_not_resized():
    found = pixels_of(Image.new("RGB", (84, 41), "white"), 84)
    assert found.shape == (3, 84, 84)
    assert torch.equal(found[:, 21:62], torch.ones(3, 41, 84))
    assert found.sum() == 3 * 41 * 84


def found_ids():
    """The ids of all prompts, by the name under which the published ones are recorded."""
    bert = scorer("image_reward").tokens(prompts())
    return {
        "pickscore/input_ids": scorer("pickscore").clip.tokens(prompts()),
        "hpsv2/input_ids": scorer("hpsv2").clip.tokens([cleaned(prompt) for prompt in prompts()]),
        "clip_score/input_ids": scorer("clip_score").tokens(prompts()),
        "image_reward/input_ids": bert["input_ids"],
        "image_reward/attention_mask": bert["attention_mask"],
    }


def published_ids(name):
    """open_clip fills up with 0 and Hugging Face with end tokens, which the network does not look at."""
    ids = golden()[name]
    return ids.where(ids > 0, 2049) if name == "hpsv2/input_ids" else ids


def test_ids():
    for name, found in found_ids().items():
        assert torch.equal(found.int(), published_ids(name)), name


def rewards_of_given_ids():
    """As image_reward/*/score_gard_hand."""
    tokens = {"input_ids": golden()["image_reward/hand_ids"], "attention_mask": golden()["image_reward/hand_mask"]}
    pixels = torch.stack([openai(image, 224) for image in images()]) / 255
    with torch.no_grad():
        return scorer("image_reward").reward(normalised(pixels, scorer("hpsv2").clip), tokens)


def test_image_reward_of_given_ids():
    assert_close(rewards_of_given_ids(), golden()["image_reward/f32/score_gard_hand"], rtol=0, atol=5e-5)


def test_pickscore_of_a_judge_in_memory():
    judge = judge_files.load(
        JudgeConfig(path=str(EVAL / "pick"), kind="pickscore", components=str(EVAL / "tokenizer")), None
    )
    found = PickScore(LoadedCLIP(judge.clip, judge.tokenizer, judge.mean, judge.std))(images(), prompts())
    assert torch.equal(found["pickscore"], scorer("pickscore")(images(), prompts())["pickscore"])
    judge.clip.modulated = True
    with pytest.raises(ValueError, match="timestep"):
        PickScore(LoadedCLIP(judge.clip, judge.tokenizer, judge.mean, judge.std))


def test_safetensors_score_as_the_pickle_does(tmp_path):
    state = torch.load(FILES["hpsv2"][0], weights_only=True)["state_dict"]
    save_file(state, tmp_path / "hps.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes((EVAL / "hps" / "open_clip_config.json").read_bytes())
    found = find.load("hpsv2", str(tmp_path / "hps.safetensors"), str(EVAL / "tokenizer"))
    assert torch.equal(found(images(), prompts())["hpsv2"], scorer("hpsv2")(images(), prompts())["hpsv2"])
