"""Loads a plain CLIP with what belongs to it, for the scorers that are one or stand on one; computes its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from ..errors import UserError
from ..models.clip_files import TOKENIZER, ClipFolders, clip_network, clip_tokenizer, mean_and_std
from ..models.weight_files import check_fit, fill, read_weights, weights_file
from .files import described
from .pixels import ToBytes, pixels
from .scorer import Options, fetch_published

if TYPE_CHECKING:
    from ..judge.clip import TimeConditionedCLIP

SETTINGS = ("config.json", "preprocessor_config.json", *TOKENIZER)
NEEDED = (("config.json",), ("preprocessor_config.json",), ("tokenizer.json", "vocab.json"))  # one of each


@dataclass(frozen=True, slots=True)
class Published:
    """What the authors of a scorer use: hub ids of a CLIP and of one that has what it lacks. key is for messages."""

    key: str
    weights: str
    components: str


@dataclass(frozen=True, slots=True)
class LoadedCLIP:
    """A CLIP, its tokenizer, mean and std of images in [0, 1]; the network may also be a judge's of kind pickscore."""

    network: CLIPModel | TimeConditionedCLIP
    tokenizer: CLIPTokenizer
    mean: Sequence[float]
    std: Sequence[float]

    def pixels(self, images: Sequence[Image.Image], to_bytes: ToBytes) -> Tensor:
        """Returns normalised pixels (N, 3, S, S) of the size that the network sees."""
        return pixels(images, self.network.config.vision_config.image_size, to_bytes, (self.mean, self.std))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Returns ids (N, L) of L tokens, the network's most; over-long prompts are cut and keep an end token."""
        length = self.network.config.text_config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projects normalised pixels (N, 3, S, S), of any device and type, to unit vectors (N, E)."""
        projection = self.network.visual_projection
        return unit(
            projection(self.network.vision_model(pixel_values=pixel_values.to(projection.weight)).pooler_output)
        )

    def text_features(self, ids: Tensor) -> Tensor:
        """Projects token ids (N, L), of any device, to unit vectors (N, E)."""
        projection = self.network.text_projection
        return unit(projection(self.network.text_model(input_ids=ids.to(projection.weight.device)).pooler_output))


def unit(features: Tensor) -> Tensor:
    """Divides features (N, E) by their 2-norms, in float32 or wider."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def load_clip(published: Published, weights: str | None, components: str | None, options: Options) -> LoadedCLIP:
    """Loads a CLIP from a folder, a hub id or a file of weights, in evaluation mode.

    weights, components: None is what its authors published. components: folder or hub id of the CLIP that has what the
    weights lack of configuration, tokenizer and preprocessor; it is looked at only then. Raises UserError that names
    what is missing or unfit.
    """
    key, path = published.key, weights or published.weights
    source = f"its weights come from the hub's repository {published.weights}"
    found = fetch_published(path, (*SETTINGS, "model*.safetensors*"), key, source)
    if found.is_dir() and not weights_file(found):  # a hub id's .bin files are fetched only if needed
        found = fetch_published(path, (*SETTINGS, "pytorch_model*.bin*"), key, source)
        if not weights_file(found):
            raise UserError(f"{key}: {found} has no model.safetensors or pytorch_model.bin; {source}")
    second, second_key = components or published.components, f"{key} components"
    advice = f"name the folder or hub id of the CLIP that has it, such as {published.components}"
    folders = ClipFolders({key: found}, second_key, advice)
    if any(folders.lack(*names) for names in NEEDED):
        second = fetch_published(second, SETTINGS, second_key, advice)
        folders = ClipFolders({key: found, second_key: second}, second_key, advice)
    network = clip_network(folders)
    tokenizer = clip_tokenizer(folders, network.config.text_config.vocab_size)
    mean, std = mean_and_std(folders)
    state = read_weights(found, key)
    if "visual_projection.weight" not in state:
        raise UserError(f"{key}: {found} holds {described(state)}, expected a CLIP of transformers")
    check_fit(network, state, (), f"{key}: the tensors in {found} do not fit the CLIP of its config.json")
    fill(network, state, (), f"{key}: {found}")
    return LoadedCLIP(network.to(options.device, options.dtype).eval().requires_grad_(False), tokenizer, mean, std)
