"""models/single_file: checkpoints of the original key format give back every tensor; other files are refused."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from strop.engine.errors import UserError
from strop.engine.models.base_model import KINDS
from strop.engine.models.single_file import PREFIXES, family_of_file, load_from_file, prediction_of, vae_of_file

FAMILIES = ("sd15", "sdxl")


@pytest.fixture
def tiny(tiny_file, tiny_folder, tiny_sdxl_file, tiny_sdxl_folder):
    """tiny["sdxl"] -> the checkpoint file and the folder it was made of."""
    return {"sd15": (tiny_file, tiny_folder), "sdxl": (tiny_sdxl_file, tiny_sdxl_folder)}


@pytest.fixture
def spoilt(tiny, tmp_path):
    """spoilt("sdxl", lambda name: ...) -> the checkpoint without the tensors whose name gives false."""

    def make(family, keep=lambda name: True, **more):
        file = tmp_path / "spoilt.safetensors"
        save_file({name: v for name, v in load_file(tiny[family][0]).items() if keep(name)} | more, file)
        return file

    return make


def load(kind, file, folder, part, family, dtype=torch.float32):
    return load_from_file(kind, file, PREFIXES[family][part], folder, part, dtype, "model.path")


@pytest.mark.parametrize("family, part", [(family, part) for family in FAMILIES for part in PREFIXES[family]])
def test_every_tensor_comes_back_bit_for_bit(tiny, family, part):
    file, folder = tiny[family]
    expected = KINDS[part].from_pretrained(folder / part).state_dict()
    found = load(KINDS[part], file, folder, part, family).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_a_part_has_the_type_asked_for(tiny, part):
    model = load(KINDS[part], *tiny["sdxl"], part, "sdxl", torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_read_from_the_keys(tiny, family):
    assert family_of_file(tiny[family][0], "model.path", own_vae=True) == family


@pytest.mark.parametrize(
    "names, found",
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora.down.weight"], "a LoRA"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "an SD3"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a part of a model in diffusers format"),
        (["encoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"], "a VAE alone"),
        (["weight"], "no checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused_by_what_they_are(tmp_path, names, found):
    file = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(4) for name in names}, file)
    with pytest.raises(UserError, match=rf"^model\.path: .*file\.safetensors is {found}; expected .* in one file$"):
        family_of_file(file, "model.path", own_vae=True)


@pytest.mark.parametrize(
    "family, keep, more, found",
    [
        (
            "sd15",
            "",
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)},
            "a model with 9 input",
        ),
        ("sdxl", "", {"conditioner.embedders.0.model.ln_final.weight": torch.zeros(4)}, "an SDXL refiner"),
        ("sd15", "", {"cond_stage_model.model.ln_final.weight": torch.zeros(4)}, "a Stable Diffusion 2"),
        ("sdxl", "", {"edm_mean": torch.zeros(4)}, "a model trained on another kind of noise"),
        ("sd15", "cond_stage_model.", {}, "a checkpoint without text_encoder"),
        ("sdxl", "conditioner.embedders.1.", {}, "a checkpoint without text_encoder_2"),
        ("sdxl", "first_stage_model.", {}, "a checkpoint without vae"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_checkpoints_are_refused_by_what_they_are(spoilt, family, keep, more, found):
    file = spoilt(family, lambda name: not keep or not name.startswith(keep), **more)
    with pytest.raises(UserError, match=rf"^model\.path: .* is {found}"):
        family_of_file(file, "model.path", own_vae=True)


def test_a_checkpoint_needs_no_vae_where_another_is_given(spoilt):
    file = spoilt("sdxl", lambda name: not name.startswith("first_stage_model."))
    assert family_of_file(file, "model.path", own_vae=False) == "sdxl"


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"^model\.path: .* is no \.safetensors file"):
        family_of_file(file, "model.path", own_vae=True)


@pytest.mark.parametrize(
    "part, name",
    [
        ("unet", "model.diffusion_model.out.2.bias"),
        ("vae", "first_stage_model.decoder.conv_out.bias"),
        ("text_encoder", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
        ("text_encoder_2", "conditioner.embedders.1.model.ln_final.bias"),
    ],
)
def test_a_lacking_tensor_is_noticed(tiny, spoilt, part, name):
    """Not filled up with random numbers."""
    file = spoilt("sdxl", lambda own: own != name)
    with pytest.raises(UserError, match=rf"^model\.path: .* lacks tensors of the {part} that is configured in"):
        load(KINDS[part], file, tiny["sdxl"][1], part, "sdxl")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_tensors_of_another_architecture_are_refused(tiny, spoilt, part):
    prefix = PREFIXES["sd15"][part]
    odd = {name: torch.zeros(7, 7) for name in load_file(tiny["sd15"][0]) if name.startswith(prefix)}
    with pytest.raises(UserError, match=rf"^model\.path: .* holds no {part} of the architecture in"):
        load(KINDS[part], spoilt("sd15", **odd), tiny["sd15"][1], part, "sd15")


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
def test_a_vae_file_of_any_form(tiny, tmp_path, form):
    file, folder = tiny["sdxl"]
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


def test_a_file_without_a_vae_is_refused_as_one(tmp_path, tiny):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet.lora_down.weight": torch.zeros(4)}, file)
    with pytest.raises(UserError, match=r"^model\.vae: .*lora\.safetensors"):
        vae_of_file(file, tiny["sdxl"][1], torch.float32, "model.vae")
