"""Trains a second base model of tinyworld: `python -m strop.bench.tinyworld.second_base --out DIR [--scratch]`.

It is the base model trained on, as a fine-tune of a published model is: from other renders, captions and noise, by
another seed. A LoRA that was trained on the first base is then evaluated on this one. With --scratch it begins from
other random weights, with which a LoRA of the first base has nothing in common but the names of the layers. VAE and
vocabulary are the first base's either way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from strop.bench.tinyworld import models, train_unet
from strop.bench.tinyworld.build import HERE
from strop.bench.tinyworld.training import generator, stage_seed

SHORTER = train_unet.Training(steps=400, latents=4096, narrow=False, save_every=100)


def train(out: Path, seed: int, scratch: bool, training: train_unet.Training = SHORTER) -> None:
    """Writes the second base model as the folder out/sd."""
    first, stage = HERE / "weights" / "sd", f"unet/second/{seed}"
    if scratch:
        tokens = models.tokenizer()
        parts = {
            "unet": models.unet(stage_seed(stage)),
            "text": models.text_encoder(tokens, stage_seed(f"{stage}/text")),
        }
    else:
        parts = {
            "unet": UNet2DConditionModel.from_pretrained(first / "unet"),
            "text": CLIPTextModel.from_pretrained(first / "text_encoder", dtype=torch.float32),
        }
    vae = AutoencoderKL.from_pretrained(first / "vae").eval()
    networks = torch.nn.ModuleDict({name: part.float().train() for name, part in parts.items()})
    train_unet.fit(out, vae, networks, training, generator(stage))


def main(argv: Sequence[str]) -> None:
    """Trains a second base model by the command line."""
    parser = argparse.ArgumentParser(description="Train a second base model of tinyworld.")
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets sd/, a model in diffusers format")
    parser.add_argument("--seed", type=int, default=1, help="of its data and noise (default: %(default)s)")
    parser.add_argument("--scratch", action="store_true", help="begin from random weights instead of the first base's")
    parser.add_argument("--steps", type=int, default=SHORTER.steps, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    train(args.out, args.seed, args.scratch, replace(SHORTER, steps=args.steps))


if __name__ == "__main__":
    main(sys.argv[1:])
