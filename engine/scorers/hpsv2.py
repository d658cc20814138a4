"""HPSv2 and HPSv2.1: 100 cos(image, text) of a ViT-H/14 tuned on human choices, in the file of open_clip.

The authors' `score` is the cosine; their benchmark, and every table, has it times 100, as here. An image's long side
goes to S, the rest is black; the prompt is cleaned as open_clip cleans it. They compute in float16 by autocast; here
Options.dtype says. Source: github.com/tgxs002/HPSv2, package hpsv2 1.2.0.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

import ftfy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPConfig, CLIPModel

from ..models.clip_files import TOKENIZER, ClipFolders, clip_tokenizer
from .clip import LoadedCLIP
from .files import Weights
from .pixels import normalised, rgb_bytes
from .scorer import CLIP_MEAN, CLIP_STD, DEFAULTS, OPENAI_CLIP, Options, fetch_published, find_file, in_batches

FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
CONFIG = "open_clip_config.json"
NAMES = {  # CLIPModel's -> open_clip's, the first that a name begins with
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
}
WITHIN = {"layer_norm": "ln_", "self_attn.": "attn.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
PROJECTIONS = ("q_proj.", "k_proj.", "v_proj.")  # one tensor in open_clip, in this order


class HPSv2:
    """Scores images by HPSv2 or HPSv2.1: {name: (N,)}."""

    def __init__(self, name: str, clip: LoadedCLIP, batch: int = DEFAULTS.batch):
        """name: hpsv2 or hpsv2.1, whichever the weights are of; their tensors do not tell."""
        self.name, self.clip, self.batch = name, clip, batch

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores of N images (scorers/scorer.py) for N prompts."""
        return {self.name: in_batches(self._score, images, prompts, self.batch)}

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        size = self.clip.network.config.vision_config.image_size
        pixels = torch.stack([pixels_of(image, size) for image in images])
        image = self.clip.image_features(normalised(pixels, (self.clip.mean, self.clip.std)))
        text = self.clip.text_features(self.clip.tokens([cleaned(prompt) for prompt in prompts]))
        return 100 * (image * text).sum(-1)


def pixels_of(image: Image.Image, size: int) -> Tensor:
    """Returns pixels (3, S, S): the long side resized to S, the short one padded with 0 on both sides.

    The resizing is bicubic on the tensor, with antialiasing, torchvision's default of today; its overshoot
    past [0, 1] stays. The authors leave an image whose long side is S as it is, and cannot score it unless it is
    square; here it is padded like any other.
    """
    pixels = rgb_bytes(image.convert("RGB")) / 255
    scale = size / max(image.size)
    height, width = (round(side * scale) for side in pixels.shape[1:])
    if scale != 1:
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return pad(pixels, (left, size - width - left, top, size - height - top))


def cleaned(prompt: str) -> str:
    """Cleans a prompt as open_clip does: ftfy, HTML entities twice, runs of white space to one blank.

    Hugging Face's tokenizer then gives open_clip's ids, but for the text of an end token within a prompt.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def load(name: str, weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> HPSv2:
    """Loads HPSv2 or HPSv2.1 (name: hpsv2, hpsv2.1) from a file, a folder that has the authors' file, or a hub id.

    weights: None is the authors' own. components: folder or hub id of CLIP's tokenizer; None is openai's. Raises
    UserError that names what is missing or unfit.
    """
    repository = f"the hub's repository {REPOSITORY}"
    file = find_file(weights or f"{REPOSITORY}/{FILES[name]}", FILES[name], name, repository)
    published = Weights.read(file, name, f"the ViT-H/14 of {FILES[name]}")
    with torch.device("meta"):
        network = CLIPModel(configuration(published))
    key, advice = (
        f"{name} components",
        f"name the folder or hub id of a CLIP with its tokenizer, such as {OPENAI_CLIP}",
    )
    folder = fetch_published(components or OPENAI_CLIP, TOKENIZER, key, advice)
    folders = ClipFolders({key: folder}, key, advice)
    tokenizer = clip_tokenizer(folders, network.config.text_config.vocab_size)
    published.fill(network, source)
    network = network.to(options.device, options.dtype).eval().requires_grad_(False)
    return HPSv2(name, LoadedCLIP(network, tokenizer, CLIP_MEAN, CLIP_STD), options.batch)


def configuration(weights: Weights) -> CLIPConfig:
    """Reads the sizes of a CLIP off open_clip's tensors; the pooled token is that of the largest id, the end token."""
    text, projection = weights.size("text_projection", 0), weights.size("text_projection", 1)
    vision, patch = weights.size("visual.conv1.weight", 0), weights.size("visual.conv1.weight", 3)
    side = math.isqrt(weights.size("visual.positional_embedding", 0) - 1)
    block = "resblocks.{}.mlp.c_fc.weight"
    text_heads = weights.beside(CONFIG, "text_cfg", "heads")
    head_width = weights.beside(CONFIG, "vision_cfg", "head_width")
    return CLIPConfig(
        projection_dim=projection,
        text_config={
            "hidden_size": text, "intermediate_size": weights.size(f"transformer.{block.format(0)}", 0),
            "num_hidden_layers": weights.count(f"transformer.{block}"), "hidden_act": "gelu",
            "bos_token_id": 0, "eos_token_id": 2,
            "num_attention_heads": weights.heads(text, text_heads, CONFIG),
            "vocab_size": weights.size("token_embedding.weight", 0),
            "max_position_embeddings": weights.size("positional_embedding", 0),
        },
        vision_config={
            "hidden_size": vision, "intermediate_size": weights.size(f"visual.transformer.{block.format(0)}", 0),
            "num_hidden_layers": weights.count(f"visual.transformer.{block}"), "hidden_act": "gelu",
            "num_attention_heads": weights.heads(vision, head_width and vision // head_width, CONFIG),
            "image_size": patch * side, "patch_size": patch,
        },
    )  # fmt: skip


def source(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Returns open_clip's name of a tensor of CLIPModel, and what makes the one of the other."""
    begin = next((begin for begin in NAMES if name.startswith(begin)), "")
    published = NAMES.get(begin, "") + name.removeprefix(begin)
    for new, old in WITHIN.items():
        published = published.replace(new, old)
    for third, projection in enumerate(PROJECTIONS):
        if projection in published:
            return published.replace(projection, "in_proj_"), lambda value, third=third: value.tensor_split(3)[third]
    return published, lambda value: value.transpose(0, -1) if name.endswith("_projection.weight") else value
