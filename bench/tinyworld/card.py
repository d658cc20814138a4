"""Writes weights/README.md, the model card, from weights/figures.json."""

from __future__ import annotations

import json
from pathlib import Path

_TITLES = {
    "vae": "Autoencoder (sd/vae)",
    "unet": "UNet and text encoder (sd/unet, sd/text_encoder)",
    "tiny_decoder": "Tiny decoder (tiny_decoder/): PSNR to the autoencoder's images",
    "base": "Base model: 384 held-out prompts, DDIM 20 steps, eta 0",
    "examiners": "Examiners (examiners/)",
    "pickscore": "PickScore (pickscore/)",
    "judge": "Step-aware preference model (judge/)",
    "judge_latent": "Latent judge (judge_latent/)",
}

_HEAD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---

# tinyworld

A Stable-Diffusion-style text-to-image model of a synthetic world of coloured shapes, with a preference model and two
examiners, all of them small enough to post-train on a laptop in minutes. Because the world is drawn by
`bench/tinyworld/render.py`, the true quality q of every image is known. Trained from scratch on renders; no other
data, no other weights. 64x64 RGB images, 16x16x4 latents, fp16 safetensors.

| folder | class | what it is for |
|---|---|---|
| `sd/` | diffusers `StableDiffusionPipeline` | the base model that is post-trained |
| `tiny_decoder/` | diffusers `AutoencoderTiny`, its decoder | decodes the judge's images in cheap rollouts |
| `pickscore/` | transformers `CLIPModel` | generic preferences: alignment and quality blended |
| `judge/` | made from `pickscore/` by `strop.engine.train_judge` | the step-aware preference model |
| `judge_latent/` | made from `sd/` by `strop.engine.train_judge` | a judge that reads noisy latents |
| `examiners/` | two CNNs, see `examiners.py` | grade quality and alignment; never used in training a model |

![Samples of the base model: held-out prompts, guidance 4](samples.png)

**How to rebuild:** `make tinyworld`, or stage by stage `python -m strop.bench.tinyworld.build [stage ...]`.

**Known limits.** The models know the captions of `world.py` and nothing else. Pretraining has seen every kind of
caption, those of `prompts/heldout.txt` too: they are held out from post-training, not from pretraining. The checker is
not perfect (see below), so that alignment figures carry its errors.

**Licence:** Apache-2.0.
"""


def _size(folder: Path) -> float:
    """Returns the MB (10^6 bytes) of all safetensors under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def write(weights: Path) -> None:
    """Writes weights/README.md."""
    figures = json.loads((weights / "figures.json").read_text())
    lines = [_HEAD, "## Figures reached", ""]
    for stage, title in _TITLES.items():
        if stage in figures:
            lines += [f"### {title}", "", "| figure | value |", "|---|---|"]
            lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in figures[stage].items()]
            lines += [""]
    folders = [path for path in sorted(weights.iterdir()) if path.is_dir()]
    lines += ["## Sizes", "", "| folder | MB |", "|---|---|"]
    lines += [f"| {folder.name}/ | {_size(folder):.2f} |" for folder in folders]
    lines += [f"| all | {_size(weights):.2f} |"]
    (weights / "README.md").write_text("\n".join(lines) + "\n")
