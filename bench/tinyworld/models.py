"""Builds tinyworld's models with random weights: the classes of Stable Diffusion and CLIP, made small.

Every constructor draws its initial weights from the seed it gets, in a forked global RNG, because diffusers and
transformers take no torch.Generator.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from strop.bench.tinyworld.world import MAX_TOKENS, WORDS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT_WIDTH = 64


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Splits a word by BPE: the earliest merge first, until none fits."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while fitting := [pair for pair in pairwise(pieces) if pair in merges]:
        first = min(fitting, key=merges.index)
        at = list(pairwise(pieces)).index(first)
        pieces[at : at + 2] = ["".join(first)]
    return pieces


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Builds a CLIP-style BPE in which every word of the world is one token. Word by word, new merges join the pieces
    that earlier ones leave; because new ones rank last, they cannot break up an earlier word."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(pieces := _pieces(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
            tokens.append(pieces[0] + pieces[1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # the end has the largest id, as in CLIP
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenizer() -> CLIPTokenizer:
    """Builds a CLIPTokenizer over the world's words; other words fall apart into pieces and letters."""
    vocabulary, merges = _vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        settings = {"model_max_length": MAX_TOKENS, "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        return CLIPTokenizer.from_pretrained(folder, **settings)


def tokenize(tokens: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Returns token ids (n, 16) int64, padded and cut to 16."""
    return tokens(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def _text_config(width: int, layers: int, tokens: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }


def text_encoder(tokens: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """Builds a text encoder of 2 layers of width 64."""
    return _seeded(lambda: CLIPTextModel(CLIPTextConfig(**_text_config(TEXT_WIDTH, 2, tokens))), seed)


def vae(seed: int) -> AutoencoderKL:
    """Builds an autoencoder with f = 4: (n, 3, 64, 64) images to (n, 4, 16, 16) latents."""
    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
        ),
        seed,
    )


def tiny_decoder(seed: int) -> AutoencoderTiny:
    """Builds a decoder of (n, 4, 16, 16) latents to (n, 3, 64, 64) images, with the smallest encoder allowed."""
    return _seeded(
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(4, 4, 4),
            num_encoder_blocks=(1, 1, 1),
            decoder_block_out_channels=(16, 16, 16),
            num_decoder_blocks=(4, 3, 1),
        ),
        seed,
    )


def unet(seed: int) -> UNet2DConditionModel:
    """Builds a UNet of 2.7 M parameters on (n, 4, 16, 16) latents; cross-attention at 8x8 and 4x4."""
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        ),
        seed,
    )


def scheduler() -> DDIMScheduler:
    """Builds a DDIM scheduler with Stable Diffusion's betas."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def pipeline(vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel) -> StableDiffusionPipeline:
    """Joins the parts to a StableDiffusionPipeline without safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_as_float32(folder: Path) -> None:
    """Writes into a transformers model folder that its fp16 weights are loaded as fp32 unless another dtype is asked
    for: transformers reads that in config.json, diffusers always loads fp32, and a pipeline must not mix the two."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def clip(tokens: CLIPTokenizer, seed: int) -> CLIPModel:
    """Builds a CLIP of 0.48 M parameters: ViT with patches of 8, width 96, 3 layers; text of width 64, 2 layers."""
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = CLIPConfig(text_config=_text_config(TEXT_WIDTH, 2, tokens), vision_config=vision, projection_dim=64)
    return _seeded(lambda: CLIPModel(config), seed)


class Checker(nn.Module):
    """A small CNN on (n, 3, 64, 64) images in [-1, 1], one linear head per entry of `heads` (name -> classes).
    forward returns {name: (n, classes)}."""

    def __init__(self, heads: dict[str, int], width: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(
            _block(3, w, 2), _block(w, 2 * w, 2), _block(2 * w, 3 * w, 2), _block(3 * w, 3 * w, 1)
        )  # (n, 3w, 8, 8)
        self.mix = nn.Sequential(nn.Conv2d(3 * w, w, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * w, 192), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, classes) for name, classes in heads.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.mix(self.stem(images))
        return {name: head(features) for name, head in self.heads.items()}


class Regressor(nn.Module):
    """A small CNN on (n, 3, 64, 64) images in [-1, 1] that pools over the whole image. forward returns (n,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(
            _block(3, w, 2), _block(w, 2 * w, 2), _block(2 * w, 3 * w, 2), _block(3 * w, 3 * w, 1)
        )
        self.head = nn.Sequential(nn.Linear(6 * w, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)  # (n, 3w, 8, 8)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(pooled)[:, 0]


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
    )


def checker(heads: dict[str, int], seed: int) -> Checker:
    """Builds the caption checker of about 0.6 M parameters."""
    return _seeded(lambda: Checker(heads, width=24), seed)


def regressor(seed: int) -> Regressor:
    """Builds the quality regressor of about 0.15 M parameters."""
    return _seeded(lambda: Regressor(width=20), seed)
