"""plan/meta_models: whose architecture is taken, and that its networks are those which a run loads."""

import json

import pytest
import torch

from strop.engine.config.training import Config
from strop.engine.errors import UserError
from strop.engine.models.base_model import BaseModel, load_unet
from strop.engine.models.families.find import family_named
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.plan.meta_models import Blueprint

CPU = torch.device("cpu")


def blueprint(path, family=None, judge="none", decoder=None, **model):
    config = {
        "model": {"path": str(path)} | model,
        "judge": {"path": str(judge)},
        "prompts": {"train": "none"},
        "rollout": {"decoder": decoder},
        "run": {"dir": "none", "iterations": 1},
    }
    return Blueprint.of(Config.model_validate(config), family and family_named(family))


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_sdxl_folder"], ids=["sd15", "sdxl"])
def test_a_folder_has_the_networks_that_a_run_loads(request, folder):
    path = request.getfixturevalue(folder)
    made = blueprint(path)
    real = LatentDiffusion.load(made.config.model, CPU)
    planned = made.diffusion()
    assert (made.family, made.latent_shape, made.zero_null) == (real.family, real.latent_shape, real.zero_null)
    assert made.size == (16, 16)
    assert shapes(planned.vae) == shapes(real.vae)
    for ours, theirs in zip(planned.text_encoders, real.text_encoders, strict=True):
        assert shapes(ours) == shapes(theirs)
    unet, lora = made.policy().unet, made.config.lora
    assert shapes(unet) == shapes(Policy(load_unet(made.config.model, CPU), lora.rank, lora.target_modules, 0).unet)
    assert {p.device.type for p in [*unet.parameters(), *planned.vae.parameters()]} == {"meta"}
    assert str(path) in made.source
    schedule = real.schedule(20, 1.0, 5.0)
    assert made.schedule("cpu").t == schedule.t
    assert BaseModel.find(made.config.model).zero_null() == made.zero_null


def test_its_conditioning_has_the_shapes_of_a_real_one(tiny_sdxl_folder):
    made = blueprint(tiny_sdxl_folder)
    real, planned = LatentDiffusion.load(made.config.model, CPU).encode(["a", "b"]), made.conditioning(2)
    for name in ("text", "null", "pooled", "null_pooled", "time_ids"):
        assert getattr(planned, name).shape == getattr(real, name).shape, name


@pytest.mark.parametrize(
    "path, family, found",
    [
        ("somebody/stable-diffusion-v1-5", None, "sd15"),
        ("somebody/juggernaut-XL", None, "sdxl"),
        ("somebody/juggernaut", "sdxl", "sdxl"),
    ],
)
def test_what_is_not_here_goes_by_its_name_or_by_what_one_says(path, family, found):
    made = blueprint(path, family)
    assert made.family.name == found
    assert made.size == ((1024, 1024) if found == "sdxl" else (512, 512))
    assert f"engine/models/families/{found}.py" in made.source
    assert ("--family says" if family else path) in made.source


def test_a_checkpoint_file_goes_by_its_tensors(tiny_file, tiny_folder):
    assert blueprint(tiny_file).family.name == "sd15"
    assert str(tiny_file) in blueprint(tiny_file).source
    assert blueprint(tiny_file, components=str(tiny_folder)).latent_shape == (4, 8, 8)


def test_the_type_of_the_vae_is_that_of_a_run():
    half = {"dtype": "float16"}
    assert blueprint("somebody/sdxl", **half).vae_dtype == torch.float32  # it overflows
    assert blueprint("somebody/sdxl", vae="somebody/sdxl-vae-fp16-fix", **half).vae_dtype == torch.float16
    assert blueprint("somebody/sdxl", dtype="bfloat16").vae_dtype == torch.bfloat16
    assert blueprint("somebody/sd", **half).vae_dtype == torch.float16


def test_networks_are_of_the_recipes_type_and_pytorchs_own_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(torch, "set_default_dtype", None)
    made = blueprint("somebody/sdxl", dtype="float16")
    diffusion = made.diffusion()
    for network, dtype in (
        (made.unet(), torch.float16),
        (diffusion.text_encoders[1], torch.float16),
        (diffusion.vae, torch.float32),
        (made.judge().clip, torch.float32),
    ):
        assert {p.dtype for p in network.parameters()} == {dtype}
        assert {p.device.type for p in network.parameters()} == {"meta"}
    lora = {p.dtype for p in made.policy().parameters}
    assert lora == {torch.float32}


def test_the_judge_is_pickscores_or_that_of_its_folder(clip_folder, spm):
    made = blueprint("somebody/sd", judge=clip_folder)
    assert made.judge_config.projection_dim == spm.config.projection_dim
    judge = made.judge()
    assert set(shapes(judge.clip)) == set(spm.state)
    assert str(clip_folder) in made.source
    assert "ViT-H/14" in blueprint("somebody/sd").source


def test_a_tiny_decoder_is_taesd_or_that_of_its_folder(tmp_path):
    assert blueprint("somebody/sd").decoder() is None
    taesd = blueprint("somebody/sd", decoder="somebody/taesd").decoder()
    decoder = sum(p.numel() for p in taesd.network.decoder.parameters())
    assert decoder == pytest.approx(1.22e6, rel=0.01)
    config = {"_class_name": "AutoencoderTiny", "decoder_block_out_channels": [8, 8], "num_decoder_blocks": [1, 1]}
    config |= {"encoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = blueprint("somebody/sd", decoder=str(tmp_path), decode_rows=3).decoder()
    assert (taesd.decode_rows, small.decode_rows) == (None, 3)
    assert sum(p.numel() for p in small.network.decoder.parameters()) < decoder / 10


def test_another_kind_of_judge_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"judge\.path: .* is of a model of type bert, expected clip"):
        blueprint("somebody/sd", judge=tmp_path)


def test_a_resolution_that_the_unet_cannot_halve_is_refused():
    with pytest.raises(UserError, match=r"model\.height: found 1000, expected a multiple of 32"):
        _ = blueprint("somebody/sdxl", height=1000).latent_shape
