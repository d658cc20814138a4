"""plan/meta_models: whose architecture is taken, and that its networks are those which a run loads."""

import json
from dataclasses import replace

import pytest
import torch

from strop.engine.config.find import load
from strop.engine.config.judge_training import TrainedJudgeConfig
from strop.engine.config.settings import varied
from strop.engine.config.training import ModelConfig
from strop.engine.errors import UserError
from strop.engine.judge.latent_files import begin, save
from strop.engine.models.base_model import BaseModel, load_unet
from strop.engine.models.families.find import family_named
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.unit_costs import Costs

CPU = torch.device("cpu")


@pytest.fixture
def builder(make_config):
    """builder(path, family, judge, decoder, further keys of model) -> a ModelBuilder."""

    def make(path, family=None, judge="none", decoder=None, **model):
        config = make_config(path, judge, model=model, rollout={"decoder": decoder})
        return ModelBuilder.of(config, family and family_named(family))

    return make


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_sdxl_folder"], ids=["sd15", "sdxl"])
def test_a_folder_has_the_networks_that_a_run_loads(builder, request, folder):
    path = request.getfixturevalue(folder)
    built = builder(path)
    real = LatentDiffusion.load(built.config.model, CPU)
    planned = built.diffusion()
    assert (built.family, built.latent_shape, built.zero_null) == (real.family, real.latent_shape, real.zero_null)
    assert built.schedule("cpu").t == real.schedule(20, 1.0, 5.0).t
    assert built.size == (16, 16)
    assert shapes(planned.vae) == shapes(real.vae)
    for ours, theirs in zip(planned.text_encoders, real.text_encoders, strict=True):
        assert shapes(ours) == shapes(theirs)
    unet, lora = built.policy().unet, built.config.lora
    assert shapes(unet) == shapes(Policy(load_unet(built.config.model, CPU), lora.rank, lora.target_modules, 0).unet)
    assert {p.device.type for p in [*unet.parameters(), *planned.vae.parameters()]} == {"meta"}
    assert str(path) in built.source
    assert BaseModel.find(built.config.model).zero_null() == built.zero_null
    encoded, conditioning = real.encode(["a", "b"]), built.conditioning(2)
    for name in ("text", "null", "pooled", "null_pooled", "time_ids"):
        shape = lambda cond, name=name: None if getattr(cond, name) is None else getattr(cond, name).shape
        assert shape(conditioning) == shape(encoded), name


@pytest.mark.parametrize(
    "path, family, expected",
    [
        ("somebody/stable-diffusion-v1-5", None, "sd15"),
        ("somebody/juggernaut-XL", None, "sdxl"),
        ("somebody/juggernaut", "sdxl", "sdxl"),
    ],
)
def test_what_is_not_here_goes_by_its_name_or_by_what_one_says(builder, path, family, expected):
    built = builder(path, family)
    assert built.family.name == expected
    assert built.size == ((1024, 1024) if expected == "sdxl" else (512, 512))
    assert f"engine/models/families/{expected}.py" in built.source
    assert ("--family says" if family else path) in built.source


def test_a_checkpoint_file_goes_by_its_tensors(builder, tiny_file, tiny_folder):
    assert builder(tiny_file).family.name == "sd15"
    assert str(tiny_file) in builder(tiny_file).source
    assert builder(tiny_file, components=str(tiny_folder)).latent_shape == (4, 8, 8)


def test_the_type_of_the_vae_is_that_of_a_run(builder):
    half = {"dtype": "float16"}
    assert builder("somebody/sdxl", **half).vae_dtype == torch.float32  # it overflows
    assert builder("somebody/sdxl", vae="somebody/sdxl-vae-fp16-fix", **half).vae_dtype == torch.float16
    assert builder("somebody/sdxl", dtype="bfloat16").vae_dtype == torch.bfloat16
    assert builder("somebody/sd", **half).vae_dtype == torch.float16


def test_networks_are_of_the_recipes_type_and_pytorchs_own_stays_what_it_is(builder, monkeypatch):
    monkeypatch.setattr(torch, "set_default_dtype", None)
    built = builder("somebody/sdxl", dtype="float16")
    diffusion = built.diffusion()
    for network, dtype in (
        (built.unet(), torch.float16),
        (diffusion.text_encoders[1], torch.float16),
        (diffusion.vae, torch.float32),
        (built.judge().clip, torch.float32),
    ):
        assert {p.dtype for p in network.parameters()} == {dtype}
        assert {p.device.type for p in network.parameters()} == {"meta"}
    lora = {p.dtype for p in built.policy().parameters}
    assert lora == {torch.float32}


def test_the_judge_is_pickscores_or_that_of_its_folder(builder, clip_folder, spm):
    built = builder("somebody/sd", judge=clip_folder)
    assert built.judge_config.projection_dim == spm.config.projection_dim
    judge = built.judge()
    assert set(shapes(judge.clip)) == set(spm.state)
    assert str(clip_folder) in built.source
    assert "ViT-H/14" in builder("somebody/sd").source


@pytest.mark.parametrize("kind", ["spm", "pickscore", "latent"])
def test_the_judge_is_of_its_type(builder, kind, tiny_folder, clip_folder):
    """A judge of half precision has half the bytes, but for the scale and a latent judge's projections."""
    built = builder(tiny_folder, judge=clip_folder)
    of_type = lambda dtype: varied(built.config, {"judge.kind": kind, "judge.dtype": dtype})
    single, half = (replace(built, config=of_type(dtype)) for dtype in (None, "float16"))
    bytes_of = lambda network: sum(p.nbytes for p in network.parameters())
    wide = {"visual_projection", "text_projection", "logit_scale"} if kind == "latent" else {"logit_scale"}
    network = half.judge().network
    stays = sum(p.nbytes for name, p in network.named_parameters() if name in wide)
    assert bytes_of(network) - stays == (bytes_of(single.judge().network) - stays) / 2
    in_single, in_half = (Costs(each).scores["judge"].flops for each in (single, half))
    assert in_single.all == pytest.approx(in_half.all)
    assert in_single.half == 0
    assert in_half.half > 0.9 * in_half.all


def test_a_tiny_decoder_is_taesd_or_that_of_its_folder(builder, tmp_path):
    assert builder("somebody/sd").decoder() is None
    taesd = builder("somebody/sd", decoder="somebody/taesd").decoder()
    decoder = sum(p.numel() for p in taesd.network.decoder.parameters())
    assert decoder == pytest.approx(1.22e6, rel=0.01)
    config = {"_class_name": "AutoencoderTiny", "decoder_block_out_channels": [8, 8], "num_decoder_blocks": [1, 1]}
    config |= {"encoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = builder("somebody/sd", decoder=str(tmp_path), decode_rows=3).decoder()
    assert (taesd.decode_rows, small.decode_rows) == (None, 3)
    assert sum(p.numel() for p in small.network.decoder.parameters()) < decoder / 10


@pytest.mark.parametrize("overrides, guidance", [((), 1.0), (("judge.guidance=3",), 3.0), (("judge.path=none",), 7.5)])
def test_a_latent_judge_has_the_guidance_that_its_folder_records(overrides, guidance):
    assert ModelBuilder.of(load("tinyworld_latent", overrides)).latent_judge().guidance == guidance


def test_a_judge_that_is_a_lora_has_no_networks_of_its_own(builder, tiny_folder, tmp_path):
    model, rng = ModelConfig(path=str(tiny_folder)), torch.Generator().manual_seed(0)
    diffusion = LatentDiffusion.load(model, CPU)
    real = begin(TrainedJudgeConfig(kind="latent", lora_rank=2), model, diffusion, rng)
    save(tmp_path, real)
    built = builder(tiny_folder, judge=tmp_path)
    built = replace(built, config=varied(built.config, {"judge.kind": "latent"}))
    of_shape = lambda judge: {name: value.shape for name, value in judge.network.own().items()}
    assert of_shape(built.latent_judge()) == of_shape(real)
    weights = Costs(built).weights
    assert weights["judge"] == sum(value.nbytes for value in real.network.own().values())
    assert weights["judge's text encoder"] == 0
    other = replace(built, config=varied(built.config, {"judge.dtype": "bfloat16"}))
    with pytest.raises(UserError, match=r"judge\.dtype: .* is a LoRA"):  # as a run says
        other.latent_judge()
