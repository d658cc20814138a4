"""models/family: the real configurations, fine-tunes under any name, and every model that is not of the two."""

import json
import shutil

import pytest

from strop.engine.errors import UserError
from strop.engine.models.family import family_of, read_config


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
    assert family_of(folder_of(family, **changes), "model.path") == family


def test_the_tiny_folders(tiny_folder, tiny_sdxl_folder):
    assert family_of(tiny_folder, "model.path") == "sd15"
    assert family_of(tiny_sdxl_folder, "model.path") == "sdxl"


def test_a_folder_without_model_index_is_known_by_its_parts(folder_of):
    folder = folder_of("sdxl")
    (folder / "model_index.json").unlink()
    assert family_of(folder, "model.path") == "sdxl"


@pytest.mark.parametrize(
    "family, changes, found",
    [
        ("sd15", {"unet": {"in_channels": 9}}, "a model with 9 input channels, made for inpainting"),
        ("sdxl", {"unet": {"in_channels": 8}}, "a model with 8 input channels"),
        ("sdxl", {"unet": {"out_channels": 8}}, "a model with 8 output channels"),
        ("sd15", {"unet": {"_class_name": "UNetMotionModel"}}, "a model around a UNetMotionModel"),
        ("sd15", {"unet": {"num_class_embeds": 1000}}, "a model with num_class_embeds 1000"),
        ("sd15", {"unet": {"addition_embed_type": "image"}}, "a model with addition_embed_type 'image'"),
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
        family_of(folder_of(family, **changes), "model.path")
    assert "\n" not in str(refusal.value)


def test_diffusion_transformers_are_refused_by_name(folder_of):
    folder = folder_of("sdxl", model_index={"_class_name": "StableDiffusion3Pipeline"})
    (folder / "unet").rename(folder / "transformer")
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline, with no folder unet/; expected"):
        family_of(folder, "model.path")


@pytest.mark.parametrize("name", [{"_class_name": "AutoencoderKL"}, {"model_type": "clip"}], ids=["vae", "clip"])
def test_a_single_network_is_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(name))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"is a {next(iter(name.values()))}, with no folder unet/"):
        family_of(tmp_path, "model.path")


def test_the_refiner_is_refused(folder_of):
    folder = folder_of("sdxl", unet={"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560})
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="is an SDXL refiner"):
        family_of(folder, "model.path")


def test_a_folder_around_a_checkpoint_names_the_file(tmp_path):
    (tmp_path / "dream.safetensors").touch()
    with pytest.raises(UserError, match=r"write .*/dream\.safetensors"):
        family_of(tmp_path, "model.path")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_configuration_is_named(folder_of, text):
    folder = folder_of("sd15")
    (folder / "unet" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.components: .*unet/config\.json"):
        read_config(folder, "unet", "model.components")
