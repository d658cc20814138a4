"""models/families: the real configurations, fine-tunes under any name, and every model that is of no family."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

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


FINE_TUNES = {
    "original": {},
    "other names": {"model_index": {"_class_name": "StableDiffusionImg2ImgPipeline", "_name_or_path": "flux-sd3"}},
    "no index": {"model_index": {"_class_name": "absent"}},
    "other sampler": {"scheduler": {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "trailing"}},
    "v-prediction": {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}},
    "other size": {"unet": {"sample_size": 96}},
    "other VAE": {"vae": {"force_upcast": False}},
}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("changes", FINE_TUNES)
def test_the_two_families_and_their_fine_tunes(folder_of, family, changes):
    folder = folder_of(family, **FINE_TUNES[changes])
    if changes == "no index":
        (folder / "model_index.json").unlink()
    assert family_of_folder(folder, "model.path").name == family


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_tiny_models_in_both_forms(tiny_checkpoints, spoilt, family):
    file, folder = tiny_checkpoints[family]
    assert family_of_folder(folder, "model.path").name == family
    assert family_of_file(file, "model.path", own_vae=True).name == family
    without_vae = spoilt(family, lambda name: not name.startswith("first_stage_model."))
    assert family_of_file(without_vae, "model.path", own_vae=False).name == family


EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "beta_start": "absent"}
OTHER_MODELS = [  # family, changes of its configurations, what the sentence says that it is
    ("sd15", SD2, "a Stable Diffusion 2"),
    ("sd15", SD2 | {"unet": SD2_UNET | {"upcast_attention": True}, "scheduler": V_PREDICTION}, "a Stable Diffusion 2"),
    ("sd15", SD2 | {"unet": SD2_UNET | {"cross_attention_dim": 768}, "text_encoder": {}}, "a Stable Diffusion 2"),
    ("sd15", {"unet": {"in_channels": 9}}, "9 input channels, made for inpainting"),
    ("sdxl", {"unet": {"in_channels": 8}}, "8 input channels"),
    ("sdxl", {"unet": {"out_channels": 8}}, "8 output channels"),
    ("sd15", {"unet": {"_class_name": "UNetMotionModel"}}, "UNetMotionModel"),
    ("sd15", {"unet": {"num_class_embeds": 1000}}, "num_class_embeds 1000"),
    ("sd15", {"unet": {"addition_embed_type": "image"}}, "addition_embed_type 'image'"),
    ("sd15", {"unet": {"attention_type": "gated"}}, "attention_type 'gated'"),
    ("sd15", SD2 | {"unet": SD2_UNET | {"in_channels": 9}}, "9 input channels, made for inpainting"),
    ("sd15", SD2 | {"unet": SD2_UNET | {"class_embed_type": "projection"}}, "class_embed_type 'projection'"),
    ("sd15", {"unet": {"time_cond_proj_dim": 256}}, "time_cond_proj_dim"),
    ("sdxl", {"unet": {"projection_class_embeddings_input_dim": 2560}}, "does not take 6 sizes"),
    ("sd15", {"unet": {"cross_attention_dim": 1024}}, "text 1024 wide", "[768]"),
    ("sdxl", {"text_encoder_2": {"hidden_size": 768}}, "text 2048 wide", "[768, 768"),
    ("sd15", {"text_encoder": {"model_type": "xlm-roberta"}}, "xlm-roberta"),
    ("sd15", {"scheduler": {"prediction_type": "sample"}}, "prediction_type 'sample'"),
    ("sdxl", {"scheduler": {"num_train_timesteps": 4000}}, "4000 timesteps"),
    ("sdxl", {"scheduler": EDM}, "EDMDPMSolverMultistepScheduler"),
]


def refusal(find, path, **options):
    with pytest.raises(UserError) as refused:
        find(path, "model.path", **options)
    sentence = str(refused.value)
    assert sentence.startswith(f"model.path: {path} is ")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("family, changes, words", [(*row[:2], row[2:]) for row in OTHER_MODELS], ids=str)
def test_other_models_are_refused_by_what_they_are(folder_of, family, changes, words):
    sentence = refusal(family_of_folder, folder_of(family, **changes))
    assert [word for word in words if word not in sentence] == []


def transformer(folder_of):
    folder = folder_of("sdxl", model_index={"_class_name": "StableDiffusion3Pipeline"})
    (folder / "unet").rename(folder / "transformer")


def refiner(folder_of):
    folder = folder_of("sdxl", unet={"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560})
    shutil.rmtree(folder / "text_encoder")


@pytest.mark.parametrize(
    "content, word",
    [
        (transformer, "StableDiffusion3Pipeline"),
        (refiner, "an SDXL refiner"),
        ({"config.json": '{"_class_name": "AutoencoderKL"}', "model.safetensors": ""}, "AutoencoderKL"),
        ({"config.json": '{"model_type": "clip"}', "model.safetensors": ""}, "clip"),
        ({"dream.safetensors": ""}, "/dream.safetensors"),
    ],
    ids=["transformer", "refiner", "vae", "clip", "checkpoint"],
)
def test_other_folders_are_refused_by_what_they_are(tmp_path, folder_of, content, word):
    if callable(content):
        content(folder_of)
    else:
        for name, text in content.items():
            (tmp_path / name).write_text(text)
    assert word in refusal(family_of_folder, tmp_path)


INPAINTING = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
OTHER_FILES = [  # the family, what its checkpoint lacks, what it has besides; what the sentence says that it is
    (None, "", ["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "a LoRA"),
    (None, "", ["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
    (None, "", ["unet.down_blocks.0.attentions.0.to_q.lora.down.weight"], "a LoRA"),
    (None, "", ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "an SD3"),
    (None, "", ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a Flux"),
    (None, "", ["down_blocks.0.resnets.0.conv1.weight"], "a part of a model in diffusers format"),
    (None, "", ["encoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"], "a VAE alone"),
    (None, "", ["weight"], "no checkpoint"),
    ("sd15", "", INPAINTING, "a model with 9 input channels"),
    ("sdxl", "", ["conditioner.embedders.0.model.ln_final.weight"], "an SDXL refiner"),
    ("sd15", "", ["cond_stage_model.model.ln_final.weight"], "a Stable Diffusion 2"),
    ("sdxl", "", ["edm_mean"], "a model trained on another kind of noise"),
    ("sd15", "cond_stage_model.", [], "a checkpoint without text_encoder"),
    ("sdxl", "conditioner.embedders.1.", [], "a checkpoint without text_encoder_2"),
    ("sdxl", "first_stage_model.", [], "a checkpoint without vae"),
]


@pytest.mark.parametrize("family, gone, more, words", OTHER_FILES, ids=lambda value: str(value)[:40])
def test_other_files_are_refused_by_what_they_are(spoilt, family, gone, more, words):
    more = more if isinstance(more, dict) else {name: torch.zeros(4) for name in more}
    file = spoilt(family or "sd15", lambda name: family and not (gone and name.startswith(gone)), **more)
    assert f" is {words}" in refusal(family_of_file, file, own_vae=True)


def test_no_other_file_tells_the_families_apart():
    """Descriptions of keys in config/ may name them: they are what a person reads who chooses a value."""
    files = [file for file in ENGINE.rglob("*.py") if not {"families", "config"} & set(file.relative_to(ENGINE).parts)]
    files = [file for file in files if file.name != "published.py"]  # tables of papers, by model
    names = re.compile(r"sdxl|[\"']sd15[\"']", re.IGNORECASE)
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines() if names.search(line)]
    assert len(files) > 50
    assert lines == []
