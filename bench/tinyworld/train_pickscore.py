"""Trains PickScore in small: a CLIP, first on captions and renders, then on generic preferences.

The warm start is contrastive: every image against all captions of the batch and one hard negative, its caption with one
attribute changed. Then it is cross-entropy on softmax(exp(logit_scale) * cos) over both images of a pair (PickScore's
loss), with the contrastive loss beside it so that the model still reads the caption. Almost half of the images
have been through the VAE, as the images that it will judge.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPModel

from strop.bench.tinyworld import models
from strop.bench.tinyworld.pairs import PreferencePairs, preference_pairs
from strop.bench.tinyworld.render import to_float
from strop.bench.tinyworld.train_vae import render_uint8, roundtrip
from strop.bench.tinyworld.training import Progress, batches, cosine, generator, parameters, record, set_lr, stage_seed
from strop.bench.tinyworld.world import break_scene, caption, parse, sample_scenes

AUXILIARY = 0.3  # weight of the contrastive loss beside the preference loss
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


@dataclass(frozen=True, slots=True)
class Data:
    """images (2, n, 3, 64, 64) uint8; ids, negative_ids (n, 16) int64; label_0 (n,); faithful (2, n) bool."""

    images: torch.Tensor
    ids: torch.Tensor
    negative_ids: torch.Tensor
    label_0: torch.Tensor
    faithful: torch.Tensor


def _data(pairs: PreferencePairs, vae: AutoencoderKL, decoded: float, rng: torch.Generator) -> Data:
    """Tokenises pairs; both images of the first `decoded` share of pairs go through the VAE."""
    count = int(decoded * len(pairs))
    images = torch.stack([pairs.images_0, pairs.images_1])
    for side in images:
        if count:
            side[:count] = roundtrip(vae, side[:count], 0.1, rng)
    tokens = models.tokenizer()
    negatives = [caption(break_scene(parse(text), rng)) for text in pairs.captions]
    ids, negative_ids = models.tokenize(tokens, pairs.captions), models.tokenize(tokens, negatives)
    return Data(images, ids, negative_ids, pairs.label_0, ~pairs.broken.T)


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Returns unit vectors (n, 64) of images (n, 3, 64, 64) in [-1, 1], which is PREPROCESSOR's normalisation."""
    return F.normalize(model.get_image_features(images).pooler_output, dim=-1)


def embed_texts(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Returns unit vectors (n, 64) of token ids (n, 16)."""
    return F.normalize(model.get_text_features(ids).pooler_output, dim=-1)


def _contrastive(
    scale: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, negatives: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Computes InfoNCE both ways over (n, d) unit vectors; each image also against its hard negative. Equal captions in
    a batch are no negatives of each other."""
    n = len(images)
    same = (ids[:, None] == ids[None]).all(-1) & ~torch.eye(n, dtype=torch.bool)
    logits = (scale * images @ texts.T).masked_fill(same, -1e4)
    hard = scale * (images * negatives).sum(-1, keepdim=True)
    target = torch.arange(n)
    return F.cross_entropy(torch.cat([logits, hard], 1), target) + F.cross_entropy(logits.T, target)


def _losses(model: CLIPModel, data: Data, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (preference, contrastive) losses of a batch of pairs."""
    n = len(row)
    images = embed_images(model, to_float(data.images[:, row].flatten(0, 1))).unflatten(0, (2, n))  # (2, n, d)
    ids = data.ids[row]
    texts, negatives = embed_texts(model, torch.cat([ids, data.negative_ids[row]])).split(n)
    scale = model.logit_scale.exp()
    logits = scale * (images * texts).sum(-1)  # (2, n)
    label = torch.stack([data.label_0[row], 1 - data.label_0[row]])
    preference = -(label * logits.log_softmax(0)).sum(0).mean()
    faithful = data.faithful[:, row]
    side = torch.where(faithful[0], 0, 1)  # the first image of a pair, or the second where the first breaks the caption
    usable = faithful.any(0)
    chosen = images[side, torch.arange(n)]
    contrastive = _contrastive(scale, chosen[usable], texts[usable], negatives[usable], ids[usable])
    return preference, contrastive


def train(weights: Path, count: int = 24576, warm_steps: int = 900, steps: int = 2500, batch: int = 32) -> None:
    """Trains the small PickScore for the VAE in weights/sd/vae; saves weights/pickscore and its figures."""
    start = time.monotonic()
    rng = generator("pickscore")
    vae = AutoencoderKL.from_pretrained(weights / "sd" / "vae").eval()
    data = _data(preference_pairs(count, rng), vae, 0.45, rng)
    print(f"pickscore: data after {time.monotonic() - start:.0f} s", flush=True)
    tokens = models.tokenizer()
    model = models.clip(tokens, stage_seed("pickscore")).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    rows = batches(count, batch, rng)
    progress = Progress("pickscore", warm_steps + steps)
    for step in range(warm_steps + steps):
        set_lr(optimizer, cosine(step, warm_steps + steps, peak=1e-3))
        preference, contrastive = _losses(model, data, next(rows))
        loss = contrastive if step < warm_steps else preference + AUXILIARY * contrastive
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=4.0)
        progress(step, preference=preference, contrastive=contrastive)
    save(model.eval().half(), weights / "pickscore")
    figures = evaluate(weights, vae)
    record(weights, "pickscore", figures | {"parameters": parameters(model), "seconds": time.monotonic() - start})


def save(model: CLIPModel, folder: Path) -> None:
    """Writes a CLIPModel folder with tokenizer and preprocessor_config.json."""
    model.save_pretrained(folder)
    models.load_as_float32(folder)
    models.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


@torch.no_grad()
def evaluate(weights: Path, vae: AutoencoderKL, count: int = 2048) -> dict[str, float]:
    """Measures label accuracy (ties left out) and the best possible on fresh pairs: clean, decoded, and by kind of
    pair; and how often, at equal quality, a faithful image scores above one with an attribute changed."""
    rng = generator("pickscore/evaluate")
    model = CLIPModel.from_pretrained(weights / "pickscore").eval()
    pairs = preference_pairs(count, rng)
    decided = pairs.label_0 != 0.5
    one_broken = pairs.broken[:, 0] != pairs.broken[:, 1]
    figures = {}
    for kind, decoded in (("clean", 0.0), ("decoded", 1.0)):
        data = _data(pairs, vae, decoded, rng)
        texts = embed_texts(model, data.ids)
        scores = torch.stack([(_embed_all(model, side) * texts).sum(-1) for side in data.images])  # (2, n)
        right = (scores[0] > scores[1]) == (data.label_0 > 0.5)
        figures[f"accuracy_{kind}"] = right[decided].float().mean().item()
        figures[f"accuracy_{kind}_broken"] = right[decided & one_broken].float().mean().item()
        figures[f"accuracy_{kind}_intact"] = right[decided & ~one_broken].float().mean().item()
    everything = torch.ones(count, dtype=torch.bool)
    figures["bayes_accuracy"] = pairs.bayes_accuracy(everything)
    figures["bayes_accuracy_broken"] = pairs.bayes_accuracy(one_broken)
    figures["bayes_accuracy_intact"] = pairs.bayes_accuracy(~one_broken)
    return figures | _twins(model, vae, rng)


def _twins(model: CLIPModel, vae: AutoencoderKL, rng: torch.Generator, count: int = 1024) -> dict[str, float]:
    """Measures how often a faithful decoded image scores above one of equal q with an attribute broken."""
    scenes, q = sample_scenes(count, rng), torch.rand(count, generator=rng)
    faithful = roundtrip(vae, render_uint8(scenes, q, rng), 0.0, rng)
    broken = roundtrip(vae, render_uint8([break_scene(s, rng) for s in scenes], q, rng), 0.0, rng)
    texts = embed_texts(model, models.tokenize(models.tokenizer(), [caption(s) for s in scenes]))
    better = (_embed_all(model, faithful) * texts).sum(-1) > (_embed_all(model, broken) * texts).sum(-1)
    return {"faithful_preferred_at_equal_quality": better.float().mean().item()}


def _embed_all(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([embed_images(model, to_float(part)) for part in images.split(256)])
