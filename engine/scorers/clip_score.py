"""CLIPScore: max(100 cos(image, text), 0) of openai's ViT-L/14, in the version of torchmetrics.

An over-long prompt is cut without an end token, as there. torchmetrics clamps a batch's mean; here each image has a
score of its own, so that the mean of scores is at least as large. Source: torchmetrics.multimodal.CLIPScore.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import LoadedCLIP, Published, load_clip
from .pixels import hugging_face
from .scorer import DEFAULTS, OPENAI_CLIP, Options, in_batches

PUBLISHED = Published("clip_score", OPENAI_CLIP, OPENAI_CLIP)


class ClipScore:
    """Scores images by CLIPScore: {"clip_score": (N,)}, 0 to 100."""

    def __init__(self, clip: LoadedCLIP, batch: int = DEFAULTS.batch):
        """clip: one that is in memory already will do."""
        self.clip, self.batch = clip, batch

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores of N images (scorers/scorer.py) for N prompts."""
        return {"clip_score": in_batches(self._score, images, prompts, self.batch)}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Returns ids (N, L), cut at L tokens: of a longer prompt the end token is lost."""
        length = self.clip.network.config.text_config.max_position_embeddings
        ids = self.clip.tokenizer(list(prompts), padding="max_length", max_length=length).input_ids
        return torch.tensor([row[:length] for row in ids])

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        image = self.clip.image_features(self.clip.pixels(images, hugging_face))
        return (100 * (image * self.clip.text_features(self.tokens(prompts))).sum(-1)).clamp(min=0)


def load(weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> ClipScore:
    """Loads a CLIP from a folder, a file or a hub id; None is openai's ViT-L/14, as torchmetrics has it.

    components: the CLIP with what the weights lack. Raises UserError that names what is missing or unfit.
    """
    return ClipScore(load_clip(PUBLISHED, weights, components, options), options.batch)
