"""ImageReward: a BLIP that reads the prompt while it looks at the image, and a head on its first token.

The score is (head - MEAN) / STD, so about standard normal on the authors' images. The first token stays [CLS], where
BLIP's own readers put [ENC]; a prompt has 35 tokens. Source: github.com/zai-org/ImageReward, package image-reward 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ..errors import UserError, one_line
from .files import Weights
from .pixels import openai, pixels
from .scorer import CLIP_MEAN, CLIP_STD, DEFAULTS, Options, fetch_published, find_file, in_batches

FILE, REPOSITORY = "ImageReward.pt", "zai-org/ImageReward"
BERT = "google-bert/bert-base-uncased"
BERT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
TOKENS = 35  # of a prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head, on the authors' images
VISION = {  # BlipVisionModel's names -> the authors', under blip.visual_encoder.
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "post_layernorm": "norm",
}


class ImageReward:
    """Scores images by ImageReward: {"image_reward": (N,)}."""

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module, tokenizer: BertTokenizer, batch: int
    ):
        """The parts in evaluation mode, on one device and of one type."""
        self.vision, self.text, self.head, self.tokenizer, self.batch = vision, text, head, tokenizer, batch

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores of N images (scorers/scorer.py) for N prompts."""
        return {"image_reward": in_batches(self._score, images, prompts, self.batch)}

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask, (N, 35) each: padded, and cut with an end token."""
        return self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )

    def reward(self, pixel_values: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Returns the scores (N,) of normalised pixels (N, 3, S, S) and tokens."""
        seen = self.vision(pixel_values.to(self.vision.embeddings.position_embedding)).last_hidden_state
        hidden = self.text(
            input_ids=tokens["input_ids"].to(seen.device),
            attention_mask=tokens["attention_mask"].to(seen.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,  # no causal mask
        ).last_hidden_state
        raw = self.head(hidden[:, 0])[:, 0]
        return ((raw if raw.dtype == torch.float64 else raw.float()) - MEAN) / STD

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        size = self.vision.config.image_size
        return self.reward(pixels(images, size, openai, (CLIP_MEAN, CLIP_STD)), self.tokens(prompts))


def load(weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> ImageReward:
    """Loads ImageReward from its file, a folder that has ImageReward.pt, or a hub id; None is the authors' own.

    components: folder or hub id of BERT's tokenizer, uncased; None is Google's. Raises UserError that names what is
    missing or unfit.
    """
    file = find_file(weights or f"{REPOSITORY}/{FILE}", FILE, "image_reward", f"the hub's repository {REPOSITORY}")
    published = Weights.read(file, "image_reward", f"the BLIP and the head of {FILE}")
    with torch.device("meta"):
        vision = BlipVisionModel(vision_configuration(published))
        text = BlipTextModel(text_configuration(published), add_pooling_layer=False)
    published.fill(vision, vision_source)
    published.fill(text, lambda name: (f"blip.text_encoder.{name}", lambda value: value))
    head = published.head("mlp.", text.config.hidden_size)
    tokenizer = bert_tokenizer(components or BERT, text.config.vocab_size)
    for network in (vision, text, head):
        network.to(options.device, options.dtype).eval().requires_grad_(False)
    return ImageReward(vision, text, head, tokenizer, options.batch)


def vision_configuration(weights: Weights) -> BlipVisionConfig:
    """Reads the sizes of the image encoder off its tensors."""
    encoder = "blip.visual_encoder."
    width, patch = (weights.size(f"{encoder}patch_embed.proj.weight", axis) for axis in (0, 3))
    side = math.isqrt(weights.size(f"{encoder}pos_embed", 1) - 1)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights.size(f"{encoder}blocks.0.mlp.fc1.weight", 0),
        num_hidden_layers=weights.count(f"{encoder}blocks.{{}}.mlp.fc1.weight"),
        num_attention_heads=weights.heads(width, weights.beside("config.json", "vision", "heads"), "config.json"),
        image_size=patch * side,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def text_configuration(weights: Weights) -> BlipTextConfig:
    """Reads the sizes of the text encoder off its tensors; as a decoder it has the layers that look at the image."""
    encoder = "blip.text_encoder."
    vocabulary, width = (weights.size(f"{encoder}embeddings.word_embeddings.weight", axis) for axis in (0, 1))
    given = weights.beside("med_config.json", "num_attention_heads")
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights.size(f"{encoder}encoder.layer.0.crossattention.self.key.weight", 1),
        intermediate_size=weights.size(f"{encoder}encoder.layer.0.intermediate.dense.weight", 0),
        num_hidden_layers=weights.count(f"{encoder}encoder.layer.{{}}.intermediate.dense.weight"),
        num_attention_heads=weights.heads(width, given, "med_config.json"),
        max_position_embeddings=weights.size(f"{encoder}embeddings.position_embeddings.weight", 0),
        is_decoder=True,
        bos_token_id=None,  # the defaults are those of the full vocabulary, and nothing is generated
        eos_token_id=None,
        sep_token_id=None,
    )


def vision_source(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Returns the authors' name of a tensor of BlipVisionModel."""
    for new, old in VISION.items():
        name = name.replace(new, old)
    return f"blip.visual_encoder.{name}", lambda value: value


def bert_tokenizer(path: str, vocab_size: int) -> BertTokenizer:
    """Reads BERT's tokenizer; UserError where it is missing, or has more tokens than there are embeddings."""
    key = "image_reward components"
    advice = f"name the folder or hub id of a BERT, uncased, such as {BERT}"
    folder = fetch_published(path, BERT_FILES, key, advice)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{key}: {folder} has no tokenizer; {advice}")
    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
    except Exception as error:  # the parser of tokenizer.json raises Exception itself
        raise UserError(f"{key}: the tokenizer in {folder} cannot be read ({one_line(error)})") from None
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {folder} has {len(tokenizer)} tokens, but ImageReward has {vocab_size} embeddings"
        )
    return tokenizer
