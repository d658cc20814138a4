"""models/tiny_decoder: diffusers' AutoencoderTiny on unscaled latents, and what is refused in its place."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny

from strop.engine.errors import UserError
from strop.engine.models.tiny_decoder import TinyDecoder

FLOATS = ("float32", "bfloat16")


def test_it_decodes_latents_as_diffusers_does(tiny_decoder_folder, diffusion):
    """As StableDiffusionPipeline with this VAE: latents divided by its own scaling factor, which is 1."""
    network = AutoencoderTiny.from_pretrained(tiny_decoder_folder)
    latents = 3 * torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = TinyDecoder.load(str(tiny_decoder_folder), "float32", diffusion).decode(latents)
    assert images.shape == (2, 3, 3, 16, 16) == diffusion.decode(latents).shape
    assert not images.requires_grad
    with torch.no_grad():
        for i in range(2):
            for j in range(3):
                expected = network.decode(latents[i, j : j + 1] / network.config.scaling_factor).sample[0]
                torch.testing.assert_close(images[i, j], expected, rtol=0, atol=1e-5)


def test_it_decodes_as_many_rows_at_once_as_the_recipe_says(tiny_decoder_folder, diffusion):
    whole, parts = TinyDecoder.load(str(tiny_decoder_folder), "float32", diffusion), []
    cut = TinyDecoder(whole.network, decode_rows=4)
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    hook = whole.network.decoder.register_forward_hook(lambda module, given, made: parts.append(len(made)))
    found = cut.decode(latents)
    hook.remove()
    assert parts == [4, 2]
    torch.testing.assert_close(found, whole.decode(latents), rtol=0, atol=1e-6)


def test_it_runs_in_the_type_of_the_base_model(tiny_decoder_folder, diffusion):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    precise, half = (TinyDecoder.load(str(tiny_decoder_folder), t, diffusion).decode(latents) for t in FLOATS)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), precise, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"_class_name": "AutoencoderKL"}, "of kind AutoencoderKL with 4 latent channels and 2 pixels"),
        ({"latent_channels": 16}, "of kind AutoencoderTiny with 16 latent channels and 2 pixels"),
        ({"decoder_block_out_channels": [8] * 4}, "of kind AutoencoderTiny with 4 latent channels and 8 pixels"),
    ],
    ids=["kind", "channels", "size"],
)
def test_another_network_is_refused(tiny_decoder_folder, diffusion, tmp_path, changes, found):
    folder = shutil.copytree(tiny_decoder_folder, tmp_path / "decoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"^rollout.decoder: found .* {found} to a latent's side, expected an Auto"):
        TinyDecoder.load(str(folder), "float32", diffusion)


def test_a_folder_without_weights_is_refused(tiny_decoder_folder, diffusion, tmp_path):
    shutil.copy(tiny_decoder_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"^rollout\.decoder: .* holds no weights"):
        TinyDecoder.load(str(tmp_path), "float32", diffusion)


def test_a_file_is_refused(tiny_decoder_folder, diffusion):
    with pytest.raises(UserError, match=r"^rollout\.decoder: "):
        TinyDecoder.load(str(tiny_decoder_folder / "config.json"), "float32", diffusion)
