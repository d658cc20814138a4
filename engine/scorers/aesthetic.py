"""The aesthetic score of LAION: a head of linear layers on the unit image features of openai's ViT-L/14, about 1 to 10.

It does not look at the prompt. Without activations the head is one affine map, whatever its layers. Source:
github.com/christophschuhmann/improved-aesthetic-predictor; pixels as in openai's CLIP and image-reward 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor, nn

from ..errors import UserError
from .clip import LoadedCLIP, Published, load_clip
from .files import Weights
from .pixels import openai
from .scorer import DEFAULTS, OPENAI_CLIP, Options, find_file, in_batches

FILE = "sac+logos+ava1-l14-linearMSE.pth"
SOURCE = "github.com/christophschuhmann/improved-aesthetic-predictor"
ENCODER = Published("aesthetic components", OPENAI_CLIP, OPENAI_CLIP)


class Aesthetic:
    """Scores images by themselves: {"aesthetic": (N,)}."""

    def __init__(self, clip: LoadedCLIP, head: nn.Module, batch: int = DEFAULTS.batch):
        """clip: one that is in memory already will do; head: from its features (N, E) to (N, 1), in its type."""
        self.clip, self.head, self.batch = clip, head, batch

    def __call__(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns the scores of N images (scorers/scorer.py); the N prompts change nothing."""
        return {"aesthetic": in_batches(self._score, images, prompts, self.batch)}

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        features = self.clip.image_features(self.clip.pixels(images, openai))
        return self.head(features.to(self.head[0].weight))[:, 0]


def load(weights: str | None = None, components: str | None = None, options: Options = DEFAULTS) -> Aesthetic:
    """Loads the head from its file, a folder that has it, or a hub id with the file; its authors have none on the hub.

    components: the CLIP below it, a folder or hub id; None is openai's ViT-L/14. Raises UserError that names what is
    missing or unfit.
    """
    if weights is None:
        raise UserError(f"aesthetic: the head has no home on the hub; get {FILE} from {SOURCE}, and name its path")
    file = find_file(weights, FILE, "aesthetic", SOURCE)
    published = Weights.read(file, "aesthetic", "the head of five linear layers on a CLIP")
    width = published.size("layers.0.weight", 1)
    head = published.head("", width)
    clip = load_clip(ENCODER, components, None, options)
    if (found := clip.network.config.projection_dim) != width:
        raise UserError(f"aesthetic components: found a CLIP of {found} features, expected {width}, as {file} takes")
    return Aesthetic(clip, head.to(options.device, options.dtype).eval().requires_grad_(False), options.batch)
