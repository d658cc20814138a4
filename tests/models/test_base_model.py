"""models/base_model: each way to name a base model, which of its files are read, and what is refused."""

import json
import os
import re
import shutil

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from strop.engine.config.training import ModelConfig
from strop.engine.errors import UserError
from strop.engine.models import base_model
from strop.engine.models.base_model import BaseModel, dtype_on, load_unet

CPU = torch.device("cpu")
WEIGHTS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model")
WEIGHTS |= dict.fromkeys(("text_encoder", "text_encoder_2"), "model")


@pytest.fixture
def folder(tiny_sdxl_folder, tmp_path):
    """A copy of the SDXL folder, to be changed."""
    return shutil.copytree(tiny_sdxl_folder, tmp_path / "model")


def settings(path, **changes):
    return ModelConfig(path=str(path), **{key: str(v) if key != "height" else v for key, v in changes.items()})


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same_networks(actual, expected):
    for part in WEIGHTS:
        theirs = expected.part(part, torch.float32).state_dict()
        ours = actual.part(part, torch.float32).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def as_hub(folder, cache):
    """Lays a folder into a cache as the hub's library does: owner/tiny at its branch main."""
    repository, commit = cache / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A cache of the hub to be filled, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_only_one_set_of_weights_is_downloaded(folder, tmp_path, monkeypatch):
    """Neither the other variants nor the pickled ones nor the checkpoints that lie beside."""
    for part, stem in WEIGHTS.items():
        pickled = f"{stem.replace('model', 'pytorch_model', 1)}.bin"
        for name in (f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", pickled, "openvino_model.bin"):
            (folder / part / name).touch()
    (folder / "tiny-pruned.safetensors").touch()
    local, fetched = tmp_path / "local", set()

    def download(path, revision, allow_patterns):
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            fetched.add(name)
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, local / name)
        return local

    monkeypatch.setattr("strop.engine.models.hub.snapshot_download", download)
    actual = BaseModel.find(settings("owner/tiny"))
    assert not [name for name in fetched if name.endswith((".safetensors", ".bin"))]
    for part in WEIGHTS:
        actual.part(part, torch.float32)
    weights = {name for name in fetched if name.endswith((".safetensors", ".bin"))}
    assert weights == {f"{part}/{stem}.safetensors" for part, stem in WEIGHTS.items()}


def as_fp16(folder):
    for part, stem in WEIGHTS.items():
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")


def in_shards(variant):
    def change(folder):
        unet = load_unet(settings(folder), CPU)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(folder / "unet", max_shard_size="100KB", variant=variant)
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2

    return change


def pickle_weights(folder, part, content=None):
    (file,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
    torch.save(content or load_file(file), folder / part / name)
    file.unlink()


def as_originally_released(folder):
    """Text encoders are named as in older transformers, tokenizers are a list of words and one of merges."""
    for part in ("text_encoder", "text_encoder_2"):
        file = folder / part / "model.safetensors"
        state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
        if part == "text_encoder_2":
            state["text_projection.weight"] = state.pop("text_model.text_projection.weight")
        state["text_model.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
        save_file(state, file, metadata={"format": "pt"})
    for part in ("tokenizer", "tokenizer_2"):
        model = json.loads((folder / part / "tokenizer.json").read_text())["model"]
        (folder / part / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / part / "merges.txt").write_text("#version: 0.2\n")
        (folder / part / "tokenizer.json").unlink()


FORMS = {  # what is done to a folder
    "fp16 alone": as_fp16,
    "in several files": in_shards(None),
    "in several fp16 files": in_shards("fp16"),
    "pickled": lambda folder: [pickle_weights(folder, part) for part in WEIGHTS],
    "original release": as_originally_released,
    "hub": lambda folder: None,
    "checkpoint file": lambda folder: [(folder / part / f"{WEIGHTS[part]}.safetensors").unlink() for part in WEIGHTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_is_the_same_model(folder, tiny_sdxl_folder, tiny_sdxl_file, offline, form):
    """From the cache of the hub as from a folder; of a checkpoint file the folder has the configuration alone."""
    FORMS[form](folder)
    as_hub(folder, offline)
    model = {"hub": settings("owner/tiny"), "checkpoint file": settings(tiny_sdxl_file, components=folder)}
    actual = BaseModel.find(model.get(form, settings(folder)))
    expected = BaseModel.find(settings(tiny_sdxl_folder))
    assert actual.family.name == "sdxl"
    assert_same_networks(actual, expected)
    for ours, theirs in zip(actual.tokenizers(), expected.tokenizers(), strict=True):
        same = {"padding": "max_length", "max_length": 16}
        assert ours("a red cat", **same).input_ids == theirs("a red cat", **same).input_ids


class Trap:
    """Leaves a file where it is unpickled without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_tokenizer_without_a_limit_takes_that_of_its_encoder(folder):
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    first, second = BaseModel.find(settings(folder)).tokenizers()
    assert first.model_max_length == second.model_max_length == 16


def test_a_checkpoint_file_takes_the_original_configuration_from_the_hub(tiny_sdxl_file, folder, monkeypatch):
    asked = []

    def fetch(path, revision, key, patterns):
        asked.append(path)
        return folder if key == "model.components" else tiny_sdxl_file

    monkeypatch.setattr(base_model, "fetch", fetch)
    assert BaseModel.find(settings(tiny_sdxl_file)).folder == folder
    assert asked[1:] == ["stabilityai/stable-diffusion-xl-base-1.0"]


def test_a_checkpoint_file_that_is_marked_is_a_v_prediction_model(tiny_sdxl_file, tiny_sdxl_folder, tmp_path):
    file = tmp_path / "marked.safetensors"
    save_file(load_file(tiny_sdxl_file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    scheduler = BaseModel.find(settings(file, components=tiny_sdxl_folder)).scheduler()
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("sampler", ["EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_the_schedule_is_the_models_whatever_its_sampler(folder, architectures, sampler, alphas):
    config = architectures["sdxl" if sampler.startswith("Euler") else "sd15"]["scheduler"] | {"_class_name": sampler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = BaseModel.find(settings(folder)).scheduler()
    assert torch.equal(scheduler.alphas_cumprod, alphas)
    assert (scheduler.config.prediction_type, scheduler.config.steps_offset) == ("epsilon", 1)


def test_v_prediction_without_a_signal_at_the_end(folder):
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_end": 0.01, "steps_offset": 0}
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    scheduler = BaseModel.find(settings(folder)).scheduler()
    expected = DDIMScheduler(beta_start=0.00085, beta_schedule="scaled_linear", **changes)
    assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.fixture
def other_vae(folder):
    """A VAE folder of other weights, which says that it does not overflow in float16."""
    vae = BaseModel.find(settings(folder)).part("vae", torch.float32)
    vae.register_to_config(force_upcast=False, scaling_factor=0.5)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(folder.parent / "vae")
    return folder.parent / "vae"


@pytest.mark.parametrize("form", ["vae-folder", "model-folder", "file", "hub"])
def test_a_vae_in_place_of_the_models_own(folder, other_vae, offline, form):
    """A file has no configuration of its own, so it gets that of the model's VAE."""
    shutil.copytree(other_vae, folder.parent / "whole" / "vae")
    as_hub(other_vae, offline)
    file = other_vae / "diffusion_pytorch_model.safetensors"
    forms = {"vae-folder": other_vae, "model-folder": folder.parent / "whole", "file": file, "hub": "owner/tiny"}
    vae = BaseModel.find(settings(folder, vae=forms[form])).vae(torch.float32)
    expected = load_file(file)["decoder.conv_out.bias"]
    assert torch.equal(vae.decoder.conv_out.bias, expected)
    assert vae.config.scaling_factor == (0.13025 if form == "file" else 0.5)


@pytest.mark.parametrize(
    "family, upcast, dtype, expected",
    [
        ("sdxl", {"force_upcast": True}, torch.float16, torch.float32),
        ("sdxl", {}, torch.float16, torch.float32),
        ("sdxl", {"force_upcast": False}, torch.float16, torch.float16),
        ("sdxl", {"force_upcast": True}, torch.bfloat16, torch.bfloat16),
        ("sd15", {"force_upcast": True}, torch.float16, torch.float16),
    ],
    ids=["sdxl", "sdxl-unsaid", "fp16-fix", "bfloat16", "sd15"],
)
def test_a_vae_that_overflows_in_float16_stays_in_float32(
    tiny_folder, tiny_sdxl_folder, tmp_path, family, upcast, dtype, expected
):
    copy = shutil.copytree(tiny_folder if family == "sd15" else tiny_sdxl_folder, tmp_path / "copy")
    config = json.loads((copy / "vae" / "config.json").read_text())
    config.pop("force_upcast", None)
    (copy / "vae" / "config.json").write_text(json.dumps(config | upcast))
    assert {p.dtype for p in BaseModel.find(settings(copy)).vae(dtype).parameters()} == {expected}


def test_the_size_of_a_latent(folder):
    assert BaseModel.find(settings(folder)).latent_shape(2) == (4, 8, 8)
    assert BaseModel.find(ModelConfig(path=str(folder), height=24, width=32)).latent_shape(2) == (4, 12, 16)
    edit(folder / "unet" / "config.json", sample_size=[4, 6])
    assert BaseModel.find(settings(folder)).latent_shape(2) == (4, 4, 6)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_attention_is_that_of_pytorch(folder, attention):
    unet = load_unet(settings(folder, attention=attention), CPU)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(
    "installed, works, word",
    [(False, True, "strop[cuda]"), (True, True, "GPU"), (True, False, "No operator found for this input")],
)
def test_xformers_that_cannot_run_is_refused(folder, monkeypatch, installed, works, word):
    def fail(self):
        raise NotImplementedError("No operator found\nfor this input")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    if not works:
        monkeypatch.setattr(base_model, "_check_xformers", lambda device: None)
        monkeypatch.setattr(UNet2DConditionModel, "enable_xformers_memory_efficient_attention", fail)
    with pytest.raises(UserError, match=rf"^model\.attention: .*{re.escape(word)}"):
        load_unet(settings(folder, attention="xformers"), CPU)


def test_a_type_in_which_the_gpu_does_not_compute_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert dtype_on(torch.device("cuda"), "float16", "judge.dtype") == torch.float16
    assert dtype_on(CPU, "bfloat16", "judge.dtype") == torch.bfloat16
    with pytest.raises(UserError, match=r"^judge\.dtype: found bfloat16, .*Tesla T4.*float16"):
        dtype_on(torch.device("cuda"), "bfloat16", "judge.dtype")


def config_of(part, **changes):
    return lambda folder: edit(folder / part / "config.json", **changes)


def unet_of_text(text):
    return lambda folder: (folder / "unet" / "config.json").write_text(text)


def shard_of(name):
    """Puts an index of one shard in place of the UNet's weights."""

    def change(folder):
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.unlink()
        index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))

    return change


def without_words(folder):
    """transformers would make a tokenizer of two words."""
    (folder / "tokenizer_2" / "tokenizer.json").unlink()


def with_traps(folder):
    for suffix in ("ckpt", "pt", "bin", "safetensors"):
        torch.save({"weight": Trap(folder / "sprung")}, folder / f"dream.{suffix}")


def trapped(part):
    return lambda folder: pickle_weights(folder, part, {"weight": Trap(folder / "sprung")})


WRONG_TYPES = [  # part, key, value
    ("unet", "act_fn", None),
    ("unet", "norm_num_groups", 0),
    ("vae", "norm_num_groups", 0),
    ("text_encoder", "num_hidden_layers", "x"),
]
REFUSED = [  # what is done to the folder, keys of section model, what the sentence names
    (without_words, {}, "path: .*tokenizer_2 .*tokenizer.json .*vocab.json"),
    (config_of("text_encoder_2", vocab_size=60), {}, "path: .*tokenizer_2 has 64 .*text_encoder_2 60"),
    (None, {"path": "{sd15_file}", "components": "{folder}"}, "components: .*sdxl, expected sd15"),
    (None, {"components": "{sd15}"}, "components: found .*{sd15}"),
    (None, {"path": "{sd15_file}"}, "components: null, .*stable-diffusion-v1-5"),
    (None, {"height": 32, "width": 24}, "width: found 24, .*16"),
    (config_of("unet", sample_size=None), {}, "height: null"),
    (config_of("unet", sample_size="x"), {}, "path: .*sample_size .*'x'"),
    (config_of("unet", block_out_channels=3), {}, "path: .*block_out_channels 3"),
    *[
        (config_of(part, **{key: value}), {}, f"path: .*{part}/config.json .*{key} ")
        for part, key, value in (
            *(("unet", "layers_per_block", -1), ("unet", "transformer_layers_per_block", 0)),
            *(("text_encoder", "hidden_size", "x"), ("text_encoder", "vocab_size", None)),
            *(("text_encoder", "max_position_embeddings", []), ("text_encoder", "model_type", {})),
        )
    ],
    *[(config_of(part, **{key: value}), {}, f"path: .*{part} cannot") for part, key, value in WRONG_TYPES],
    (unet_of_text("{"), {}, "path: .*unet/config.json"),
    (unet_of_text("[1]"), {"path": "{sdxl_file}", "components": "{folder}"}, "components: .*unet/config.json"),
    (with_traps, {"path": "{folder}/dream.safetensors"}, "path: .*dream.safetensors"),
    *[
        (with_traps, {"path": f"{{folder}}/dream.{end}"}, f"path: .*dream.{end} .*code")
        for end in ("ckpt", "pt", "bin")
    ],
    *[(with_traps, {"vae": f"{{folder}}/dream.{end}"}, f"vae: .*dream.{end} .*code") for end in ("ckpt", "pt", "bin")],
    *[(shard_of(name), {}, f"path: .*index.json .*{re.escape(repr(name))}") for name in (3, None, "../a", "/a", "")],
    (shard_of("a"), {}, "path: .*unet lacks a, .*index.json"),
    *[(trapped(part), {}, f"path: .*/{part} .*code") for part in WEIGHTS],
    *[
        (config_of(part, **changes), keys, f"{key}: .*{words}")
        for part, keys, key in (("vae", {}, "path"), ("../vae", {"vae": "{other_vae}"}, "vae"))
        for changes, words in (
            ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents_mean and latents_std"),
            ({"shift_factor": 0.1}, "shift_factor"),
            ({"latent_channels": 16}, "AutoencoderKL with 16"),
            ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
            ({"_class_name": None, "model_type": "clip"}, "clip"),
        )
    ],
]


def use(model):
    model = BaseModel.find(model)
    model.tokenizers(), model.latent_shape(8), model.vae(torch.float32)
    for part in WEIGHTS:
        model.part(part, torch.float32)


@pytest.mark.parametrize("change, keys, words", REFUSED)
def test_what_does_not_fit_is_refused_and_its_code_never_run(
    folder, tiny_folder, tiny_file, tiny_sdxl_file, other_vae, offline, change, keys, words
):
    if change:
        change(folder)
    places = {"folder": folder, "other_vae": other_vae}
    places |= {"sd15": tiny_folder, "sd15_file": tiny_file, "sdxl_file": tiny_sdxl_file}
    keys = {key: value.format(**places) if isinstance(value, str) else value for key, value in keys.items()}
    with pytest.raises(UserError, match=rf"^model\.{words.replace('{sd15}', str(tiny_folder))}"):
        use(ModelConfig(**{"path": str(folder)} | keys))
    assert not (folder / "sprung").exists()
