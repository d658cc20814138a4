"""models/single_file: checkpoints of the original key format give back every tensor."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from strop.engine.errors import UserError
from strop.engine.models.base_model import network_kind
from strop.engine.models.families.find import FAMILIES, family_named
from strop.engine.models.single_file import load_from_file, prediction_of, vae_of_file


def load(file, folder, part, family, dtype=torch.float32):
    kind, prefix = network_kind(family_named(family), part), family_named(family).prefixes[part]
    return load_from_file(kind, file, prefix, folder / part, dtype, "model.path")


@pytest.mark.parametrize("family, part", [(family.name, part) for family in FAMILIES for part in family.prefixes])
def test_every_tensor_comes_back_bit_for_bit(tiny_checkpoints, family, part):
    file, folder = tiny_checkpoints[family]
    expected = network_kind(family_named(family), part).from_pretrained(folder / part).state_dict()
    found = load(file, folder, part, family).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_part_has_the_type_asked_for(tiny_checkpoints, part):
    model = load(*tiny_checkpoints["sdxl"], part, "sdxl", torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    "part, name",
    [
        ("unet", "model.diffusion_model.out.2.bias"),
        ("vae", "first_stage_model.decoder.conv_out.bias"),
        ("text_encoder", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
        ("text_encoder_2", "conditioner.embedders.1.model.ln_final.bias"),
    ],
)
def test_a_lacking_tensor_is_noticed(tiny_checkpoints, spoilt, part, name):
    """Not filled up with random numbers."""
    file = spoilt("sdxl", lambda own: own != name)
    with pytest.raises(UserError, match=rf"^model\.path: .* lacks tensors of the {part} that is configured in"):
        load(file, tiny_checkpoints["sdxl"][1], part, "sdxl")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_tensors_of_another_architecture_are_refused(tiny_checkpoints, spoilt, part):
    prefix = family_named("sd15").prefixes[part]
    odd = {name: torch.zeros(7, 7) for name in load_file(tiny_checkpoints["sd15"][0]) if name.startswith(prefix)}
    with pytest.raises(UserError, match=rf"^model\.path: .* holds no {part} of the architecture in"):
        load(spoilt("sd15", **odd), tiny_checkpoints["sd15"][1], part, "sd15")


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
    if form != "checkpoint":
        state = load_file(file)
        state = {
            k.removeprefix("first_stage_model."): v for k, v in state.items() if k.startswith("first_stage_model.")
        }
        if form == "diffusers":
            (own,) = (folder / "vae").glob("*.safetensors")
            state = load_file(own)
        file = tmp_path / "vae.safetensors"
        save_file(state, file)
    expected = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    found = vae_of_file(file, folder, torch.float32, "model.vae").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_without_a_vae_is_refused_as_one(tmp_path, tiny_checkpoints):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet.lora_down.weight": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"^model\.vae: .*lora\.safetensors"):
        vae_of_file(file, tiny_checkpoints["sdxl"][1], torch.float32, "model.vae")
