"""models/single_file: checkpoints of the original key format give back every tensor."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from strop.engine.errors import UserError
from strop.engine.models.base_model import network_kind
from strop.engine.models.families.find import FAMILIES, family_named
from strop.engine.models.single_file import load_from_file, prediction_of, vae_of_file

PARTS = ("unet", "vae", "text_encoder")


def load(file, folder, part, family, dtype=torch.float32):
    kind, prefix = network_kind(family_named(family), part), family_named(family).prefixes[part]
    return load_from_file(kind, file, prefix, folder / part, dtype, "model.path")


@pytest.mark.parametrize("family, part", [(family.name, part) for family in FAMILIES for part in family.prefixes])
def test_every_tensor_comes_back_bit_for_bit(tiny_checkpoints, family, part):
    file, folder = tiny_checkpoints[family]
    expected = network_kind(family_named(family), part).from_pretrained(folder / part).state_dict()
    actual = load(file, folder, part, family).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_part_has_the_type_asked_for(tiny_checkpoints, part):
    model = load(*tiny_checkpoints["sdxl"], part, "sdxl", torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


LACKING = {
    "unet": "model.diffusion_model.out.2.bias",
    "vae": "first_stage_model.decoder.conv_out.bias",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
    "text_encoder_2": "conditioner.embedders.1.model.ln_final.bias",
}


@pytest.mark.parametrize("family, part", [*(("sdxl", part) for part in LACKING), *(("sd15", part) for part in PARTS)])
def test_a_lacking_or_misshapen_tensor_is_noticed(tiny_checkpoints, spoilt, family, part):
    """Not filled up with random numbers. Of sdxl one is gone, of sd15 all have another shape."""
    prefix = family_named(family).prefixes[part]
    odd = {name: torch.zeros(7, 7) for name in load_file(tiny_checkpoints["sd15"][0]) if name.startswith(prefix)}
    file = spoilt("sd15", **odd) if family == "sd15" else spoilt("sdxl", lambda name: name != LACKING[part])
    with pytest.raises(UserError, match=rf"^model\.path: {file} .* {part} "):
        load(file, tiny_checkpoints[family][1], part, family)


@pytest.mark.parametrize(
    "marks, expected",
    [
        ([], {}),
        (["v_pred"], {"prediction_type": "v_prediction"}),
        (["v_pred", "ztsnr"], {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
    ids=["none", "v", "v-and-zero-snr"],
)
def test_marks_of_v_prediction_are_read(spoilt, marks, expected):
    assert prediction_of(spoilt("sdxl", **{mark: torch.zeros(0) for mark in marks}), "model.path") == expected


@pytest.mark.parametrize("form", ["original", "diffusers", "checkpoint"])
def test_a_vae_file_of_any_form(tiny_checkpoints, tmp_path, form):
    file, folder = tiny_checkpoints["sdxl"]
    if form == "original":
        prefix, state = "first_stage_model.", load_file(file)
        file = tmp_path / "vae.safetensors"
        save_file({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}, file)
    if form == "diffusers":
        (file,) = (folder / "vae").glob("*.safetensors")
    expected = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    actual = vae_of_file(file, folder, torch.float32, "model.vae").state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_file_without_a_vae_is_refused_as_one(tmp_path, tiny_checkpoints):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet.lora_down.weight": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"^model\.vae: .*lora\.safetensors"):
        vae_of_file(file, tiny_checkpoints["sdxl"][1], torch.float32, "model.vae")
