"""PickScore: exp(logit_scale) * cos(image, text) of a CLIP tuned on Pick-a-Pic, about 20 for an SD-1.5 image.

Pixels are Hugging Face's, tokens its CLIP tokenizer's. Source: github.com/yuvalkirstain/PickScore.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ..models.clip_files import PICKSCORE_CLIP
from .clip import LoadedCLIP, Published, load_clip
from .pixels import hugging_face
from .scorer import DEFAULTS, Options, in_batches

PUBLISHED = Published("pickscore", "yuvalkirstain/PickScore_v1", PICKSCORE_CLIP)


class PickScore:
    """Scores images by PickScore: {"pickscore": (N,)}."""

    def __init__(self, clip: LoadedCLIP, batch: int = DEFAULTS.batch):
        """clip: also one that is in memory already, of a judge of kind pickscore that still has its text tower.

        Raises ValueError for a judge that depends on the timestep.
        """
        if getattr(clip.network, "modulated", False):
            raise ValueError("PickScore is a plain CLIP; a judge that depends on the timestep is another measure")
        self.clip, self.batch = clip, batch

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores of N images (scorers/scorer.py) for N prompts."""
        return {"pickscore": in_batches(self._score, images, prompts, self.batch)}

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        image = self.clip.image_features(self.clip.pixels(images, hugging_face))
        text = self.clip.text_features(self.clip.tokens(prompts))
        return self.clip.network.logit_scale.to(image.dtype).exp() * (image * text).sum(-1)


def load(weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> PickScore:
    """Loads PickScore from a CLIP folder, a file or a hub id; None is its authors' PickScore_v1.

    components: the CLIP with the tokenizer and preprocessor that the weights lack; None is the ViT-H of laion from
    which PickScore was tuned. Raises UserError that names what is missing or unfit.
    """
    return PickScore(load_clip(PUBLISHED, weights, components, options), options.batch)
