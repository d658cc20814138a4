"""models/tiny_decoder: diffusers' AutoencoderTiny on unscaled latents, and what is refused in its place."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny

from strop.engine.errors import UserError
from strop.engine.models.tiny_decoder import TinyDecoder

FLOATS = ("float32", "bfloat16")


def drawn(*rows):
    return torch.randn(*rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_decodes_latents_as_diffusers_does(tiny_decoder_folder, diffusion):
    """As StableDiffusionPipeline with this VAE: latents divided by its own scaling factor, which is 1."""
    network, latents = AutoencoderTiny.from_pretrained(tiny_decoder_folder), 3 * drawn(2, 3)
    images = TinyDecoder.load(str(tiny_decoder_folder), "float32", diffusion).decode(latents)
    assert images.shape == (2, 3, 3, 16, 16) == diffusion.decode(latents).shape
    assert not images.requires_grad
    with torch.no_grad():
        for image, latent in zip(images.flatten(0, 1), latents.flatten(0, 1), strict=True):
            expected = network.decode(latent[None] / network.config.scaling_factor).sample[0]
            torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_it_decodes_as_many_rows_at_once_as_the_recipe_says(tiny_decoder_folder, diffusion):
    whole, parts = TinyDecoder.load(str(tiny_decoder_folder), "float32", diffusion), []
    cut = TinyDecoder(whole.network, decode_rows=4)
    latents = drawn(2, 3)
    hook = whole.network.decoder.register_forward_hook(lambda module, latents, images: parts.append(len(images)))
    actual = cut.decode(latents)
    hook.remove()
    assert parts == [4, 2]
    torch.testing.assert_close(actual, whole.decode(latents), rtol=0, atol=1e-6)


def test_it_runs_in_the_type_of_the_base_model(tiny_decoder_folder, diffusion):
    latents = drawn(1)
    precise, half = (TinyDecoder.load(str(tiny_decoder_folder), t, diffusion).decode(latents) for t in FLOATS)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), precise, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("", {"_class_name": "AutoencoderKL"}, ("AutoencoderKL",)),
        ("", {"latent_channels": 16}, ("16 latent channels",)),
        ("", {"decoder_block_out_channels": [8] * 4}, ("8 pixels",)),
        ("", {}, ("weights",)),
        ("config.json", {}, ()),
    ],
    ids=["kind", "channels", "size", "no weights", "file"],
)
def test_another_network_is_refused(tiny_decoder_folder, diffusion, tmp_path, name, changes, words):
    config = json.loads((tiny_decoder_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as refused:
        TinyDecoder.load(str(tmp_path / name), "float32", diffusion)
    sentence = str(refused.value)
    assert sentence.startswith("rollout.decoder: ")
    assert [word for word in (str(tmp_path), *words) if word not in sentence] == []
