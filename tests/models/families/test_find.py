"""models/families: the real configurations, fine-tunes under any name, and every model that is of no family."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from strop.engine.errors import UserError
from strop.engine.models.families.find import family_of_file, family_of_folder

ENGINE = Path(__file__).parents[3] / "engine"
SD2_TEXT = {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
SD2_TEXT |= {"num_hidden_layers": 23, "projection_dim": 512}
SD2_UNET = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SD2 = {"unet": SD2_UNET, "text_encoder": SD2_TEXT}  # as stabilityai's have it
V_PREDICTION = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


@pytest.fixture
def folder_of(architectures, tmp_path):
    """folder_of("sdxl", unet={"in_channels": 9}) -> a folder of the real one's configurations, so changed."""

    def make(family, **changes):
        for part, config in architectures[family].items():
            config = config | changes.get(part, {})
            folder = tmp_path if part == "model_index" else tmp_path / part
            folder.mkdir(exist_ok=True)
            name = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
            (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        return tmp_path

    return make


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_index": {"_class_name": "StableDiffusionImg2ImgPipeline", "_name_or_path": "someone/flux-sd3"}},
        {"scheduler": {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}},
        {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
        {"unet": {"sample_size": 96}},
        {"vae": {"force_upcast": False}},
    ],
    ids=["original", "other-names", "other-sampler", "v-prediction", "other-size", "other-vae"],
)
def test_the_two_families_and_their_fine_tunes(folder_of, family, changes):
    assert family_of_folder(folder_of(family, **changes), "model.path").name == family


def test_the_tiny_folders(tiny_folder, tiny_sdxl_folder):
    assert family_of_folder(tiny_folder, "model.path").name == "sd15"
    assert family_of_folder(tiny_sdxl_folder, "model.path").name == "sdxl"


def test_a_folder_without_model_index_is_known_by_its_parts(folder_of):
    folder = folder_of("sdxl")
    (folder / "model_index.json").unlink()
    assert family_of_folder(folder, "model.path").name == "sdxl"


@pytest.mark.parametrize(
    "changes",
    [
        SD2,
        SD2 | {"unet": SD2_UNET | {"sample_size": 96, "upcast_attention": True}, "scheduler": V_PREDICTION},
        SD2 | {"unet": SD2_UNET | {"cross_attention_dim": 768}, "text_encoder": {}},
    ],
    ids=["2.1-base", "2.1", "with-the-text-encoder-of-1.5"],
)
def test_stable_diffusion_2_is_refused_as_its_file_is(folder_of, spoilt, changes):
    file = spoilt("sd15", **{"cond_stage_model.model.ln_final.weight": torch.zeros(4)})
    expected = "is a Stable Diffusion 2; expected Stable Diffusion 1.5, SDXL or a fine-tune of either"
    with pytest.raises(UserError, match=rf"^model\.path: .* {expected}$"):
        family_of_folder(folder_of("sd15", **changes), "model.path")
    with pytest.raises(UserError, match=rf"^model\.path: .* {expected}, with"):
        family_of_file(file, "model.path", own_vae=True)


@pytest.mark.parametrize(
    "family, changes, found",
    [
        ("sd15", {"unet": {"in_channels": 9}}, "a model with 9 input channels, made for inpainting"),
        ("sdxl", {"unet": {"in_channels": 8}}, "a model with 8 input channels"),
        ("sdxl", {"unet": {"out_channels": 8}}, "a model with 8 output channels"),
        ("sd15", {"unet": {"_class_name": "UNetMotionModel"}}, "a model around a UNetMotionModel"),
        ("sd15", {"unet": {"num_class_embeds": 1000}}, "a model with num_class_embeds 1000"),
        ("sd15", {"unet": {"addition_embed_type": "image"}}, "a model with addition_embed_type 'image'"),
        ("sd15", {"unet": {"attention_type": "gated"}}, "a model with attention_type 'gated'"),
        ("sd15", SD2 | {"unet": SD2_UNET | {"in_channels": 9}}, "a model with 9 input channels, made for inpainting"),
        ("sd15", SD2 | {"unet": SD2_UNET | {"in_channels": 5}}, "a model with 5 input channels"),
        ("sd15", SD2 | {"unet": SD2_UNET | {"class_embed_type": "projection"}}, "a model with class_embed_type 'proj"),
        ("sd15", {"unet": {"time_cond_proj_dim": 256}}, "a model distilled to take the guidance scale"),
        ("sdxl", {"unet": {"projection_class_embeddings_input_dim": 2560}}, "a model whose UNet does not take 6 sizes"),
        ("sd15", {"unet": {"cross_attention_dim": 1024}}, r"a model whose UNet takes text 1024 wide from .*\[768\]"),
        (
            "sdxl",
            {"text_encoder_2": {"hidden_size": 768}},
            r"a model whose UNet takes text 2048 wide from .*\[768, 768",
        ),
        ("sd15", {"text_encoder": {"model_type": "xlm-roberta"}}, "a model with text encoders of type xlm-roberta"),
        ("sd15", {"scheduler": {"prediction_type": "sample"}}, "a model with prediction_type 'sample'"),
        ("sdxl", {"scheduler": {"num_train_timesteps": 4000}}, "a model trained on 4000 timesteps"),
        (
            "sdxl",
            {"scheduler": {"_class_name": "EDMDPMSolverMultistepScheduler", "beta_start": "absent"}},
            r"a model trained on another kind of noise \(EDMDPM",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:40],
)
def test_other_models_are_refused_by_what_they_are(folder_of, family, changes, found):
    with pytest.raises(UserError, match=rf"^model\.path: .* is {found}.*; expected Stable Diffusion 1\.5") as refusal:
        family_of_folder(folder_of(family, **changes), "model.path")
    assert "\n" not in str(refusal.value)


def test_diffusion_transformers_are_refused_by_name(folder_of):
    folder = folder_of("sdxl", model_index={"_class_name": "StableDiffusion3Pipeline"})
    (folder / "unet").rename(folder / "transformer")
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline, with no folder unet/; expected"):
        family_of_folder(folder, "model.path")


@pytest.mark.parametrize("name", [{"_class_name": "AutoencoderKL"}, {"model_type": "clip"}], ids=["vae", "clip"])
def test_a_single_network_is_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(name))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"is a {next(iter(name.values()))}, with no folder unet/"):
        family_of_folder(tmp_path, "model.path")


def test_the_refiner_is_refused(folder_of):
    folder = folder_of("sdxl", unet={"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560})
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="is an SDXL refiner"):
        family_of_folder(folder, "model.path")


def test_a_folder_around_a_checkpoint_names_the_file(tmp_path):
    (tmp_path / "dream.safetensors").touch()
    with pytest.raises(UserError, match=r"write .*/dream\.safetensors"):
        family_of_folder(tmp_path, "model.path")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_family_is_read_from_the_keys(tiny_checkpoints, family):
    assert family_of_file(tiny_checkpoints[family][0], "model.path", own_vae=True).name == family


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
    assert family_of_file(file, "model.path", own_vae=False).name == "sdxl"


def test_no_other_file_tells_the_families_apart():
    """Descriptions of keys in config/ may name them: they are what a person reads who chooses a value."""
    files = [file for file in ENGINE.rglob("*.py") if file.parent.name not in ("families", "config")]
    names = re.compile(r"sdxl|[\"']sd15[\"']", re.IGNORECASE)
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines() if names.search(line)]
    assert len(files) > 50
    assert lines == []
