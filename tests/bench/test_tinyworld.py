"""tinyworld: the grammar, the renderer, the tokenizer, and the committed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTokenizer

from strop.bench.tinyworld import examiners, models, pairs, train_tiny_decoder, world
from strop.bench.tinyworld.render import render, to_float, to_uint8
from strop.bench.tinyworld.train_vae import psnr, roundtrip
from strop.engine.config.training import ModelConfig
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.tiny_decoder import TinyDecoder

HERE = Path(examiners.__file__).parent


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parse_inverts_caption():
    scenes = world.sample_scenes(2000, _rng(0))
    assert [world.parse(world.caption(scene)) for scene in scenes] == scenes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle.",
        "a photo of a cat",
        "a red circle on a red background",
        "a large red circle above a blue square",
        "a red circle above a red square",
    ],
)
def test_parse_refuses_other_sentences(text):
    with pytest.raises(ValueError, match="not a tinyworld caption"):
        world.parse(text)


def test_broken_scene_differs_in_one_named_attribute():
    rng = _rng(1)
    for scene in world.sample_scenes(500, rng):
        broken = world.break_scene(scene, rng)
        assert sum(getattr(broken, f) != getattr(scene, f) for f in world.Scene.__slots__) == 1
        assert world.is_valid(broken)


def test_renderer_is_deterministic():
    scenes, q = world.sample_scenes(16, _rng(2)), torch.rand(16, generator=_rng(3))
    first, second = render(scenes, q, _rng(4)), render(scenes, q, _rng(4))
    assert first.shape == (16, 3, 64, 64)
    assert first.abs().max() <= 1
    assert torch.equal(first, second)


def test_quality_does_not_move_the_mean_colour():
    scenes = world.sample_scenes(256, _rng(5))
    low, high = (render(scenes, torch.full((256,), q), _rng(6)).mean((2, 3)) for q in (0.0, 1.0))
    assert (high - low).abs().mean() < 0.01  # in units of [-1, 1]; a palette step is about 0.5
    assert (high - low).mean(0).abs().max() < 0.008


def test_every_word_is_one_token():
    tokens = models.tokenizer()
    for word in world.WORDS:
        assert len(tokens.tokenize(word)) == 1, word
    for text in map(world.caption, world.sample_scenes(300, _rng(7))):
        ids = tokens(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= world.MAX_TOKENS
        assert ids[-1] == max(tokens.get_vocab().values()) == tokens.eos_token_id
    assert tokens.unk_token_id not in tokens("zebra", add_special_tokens=False).input_ids


def test_preference_pairs_share_a_caption_and_their_labels_sum_to_one():
    data = pairs.load(seed=8, size=64)
    row = data[3]
    assert len(data) == 64
    assert row["image_0"].shape == row["image_1"].shape == (3, 64, 64)
    assert torch.equal(data.label_0 + data.label_1, torch.ones(64))
    assert row["label_0"] + row["label_1"] == 1
    assert 0.15 < data.broken.any(1).float().mean() < 0.55
    again = pairs.load(seed=8, size=64)
    assert torch.equal(again.images_1, data.images_1)


def test_prompts_are_valid_and_disjoint():
    train, heldout = ((HERE / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("train", "heldout"))
    assert len(set(train)) == 600
    assert len(set(heldout)) == 512
    assert not set(train) & set(heldout)
    for line in train + heldout:
        world.parse(line)


def test_weights_are_small_and_half_precision():
    files = list((HERE / "weights").rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_saved_tokenizers_are_the_code_s():
    text = "a blue square left of a green triangle on a white background"
    for folder in ("sd/tokenizer", "pickscore"):
        saved = CLIPTokenizer.from_pretrained(HERE / "weights" / folder)
        assert saved(text).input_ids == models.tokenizer()(text).input_ids


def test_the_tiny_decoder_shows_what_the_autoencoder_shows_for_less():
    folder = HERE / "weights" / "tiny_decoder"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    diffusion = LatentDiffusion.load(ModelConfig(path=str(HERE / "weights" / "sd")), torch.device("cpu"))
    tiny = TinyDecoder.load(str(folder), "float32", diffusion)
    latents, images = train_tiny_decoder.shown(HERE / "weights", 64, _rng(10), "test")
    with FlopCounterMode(display=False) as few:
        decoded = tiny.decode(latents)
    with FlopCounterMode(display=False) as many:
        plain = diffusion.decode(latents)
    assert psnr(plain, images.float()) > 60  # what it was trained towards, in half precision
    assert psnr(decoded, images.float()) > 29
    assert few.get_total_flops() < many.get_total_flops() / 3


def test_examiners_grade_decoded_renders():
    rng = _rng(9)
    scenes, q = world.sample_scenes(48, rng), torch.rand(48, generator=rng)
    images = render(scenes, q, rng)
    vae = AutoencoderKL.from_pretrained(HERE / "weights" / "sd" / "vae").eval()
    decoded = to_float(roundtrip(vae, to_uint8(images), 0.0, rng))
    assert psnr(decoded, images) > 27
    examine = examiners.load("cpu")
    seen = examine(decoded, [world.caption(scene) for scene in scenes])
    assert seen["alignment"].mean() > 0.93
    assert 1 - (seen["quality"] - q).square().mean() / q.var() > 0.9
    shuffled = [world.caption(scene) for scene in scenes[1:] + scenes[:1]]
    assert examine(decoded, shuffled)["alignment"].mean() < 0.1
    with pytest.raises(ValueError, match="zebra"):
        examine(decoded[:1], ["a zebra"])
