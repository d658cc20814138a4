"""What several test modules share: golden numbers and the tiny models behind them (tests/golden/README.md)."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from strop.engine.diffusion import LatentDiffusion
from strop.engine.policy import Policy

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
torch.set_num_threads(1)


@functools.cache
def load_golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="session")
def golden():
    """golden("case1_ddim") -> its tensors by name, for reading only."""
    return load_golden


@pytest.fixture(scope="session")
def alphas():
    """Cumulative alphas of Stable Diffusion's noise schedule (1000,)."""
    return load_golden("case1_ddim")["schedule/alphas_cumprod"]


@pytest.fixture(scope="session")
def tokenizer():
    """A CLIP tokenizer of 64 tokens, a letter each: 0 starts a text, 63 ends and fills it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)} | {f"spare{i}": i for i in range(len(pieces), 63)}
    return CLIPTokenizer(vocab=vocab | {"<|endoftext|>": 63}, merges=[], model_max_length=16)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A whole Stable Diffusion 1.5 folder of the golden models: 8x8 latents, 16x16 images, 16 tokens.

    Shared by all tests: not to be written to.
    """
    made, weights = json.loads((GOLDEN / "tiny_configs.json").read_text())["sd15"], load_golden("tiny_sd15_models")
    unet, vae = UNet2DConditionModel(**made["ctor"]["unet"]), AutoencoderKL(**made["ctor"]["vae"])
    text_encoder = CLIPTextModel(CLIPTextConfig(**made["ctor"]["text_encoder"]))
    unet.load_state_dict(part(weights, "unet."))
    vae.load_state_dict(part(weights, "vae."))
    inner = getattr(text_encoder, "text_model", text_encoder)  # newer transformers have no wrapper around it
    inner.load_state_dict(part(weights, "text_encoder.text_model."))
    folder = tmp_path_factory.mktemp("tiny-sd15")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(made["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def diffusion(tiny_folder):
    return LatentDiffusion.load(str(tiny_folder), "float32", CPU)


@pytest.fixture
def policy(tiny_folder):
    """A fresh policy of rank 4 on the golden UNet."""
    return Policy.load(str(tiny_folder), "float32", CPU, 4, LORA_TARGETS, seed=0)


@pytest.fixture(scope="session")
def spm():
    """The golden preference model: config, image mean and std, its weights and those of the plain CLIP beneath."""
    made = json.loads((GOLDEN / "case2_config.json").read_text())
    state = part(load_golden("case2_spm_state_dict"), "model.")
    plain = {k: v for k, v in state.items() if "adaLN_modulation" not in k and not k.startswith("t_embedder.")}
    config = CLIPConfig(**made["clip_config"])
    return SimpleNamespace(config=config, mean=made["image_mean"], std=made["image_std"], state=state, plain=plain)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, spm, tokenizer):
    """A plain CLIP folder as transformers writes it. Shared by all tests: not to be written to."""
    folder = tmp_path_factory.mktemp("clip")
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"image_mean": spm.mean, "image_std": spm.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder
