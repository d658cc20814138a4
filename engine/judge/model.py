"""The judge is a step-aware preference model that scores decoded predictions against prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..config.training import JudgeConfig
from ..models.base_model import dtype_on
from ..models.conditioning import Conditioning
from ..models.weight_files import check_finite, save_tensors
from . import files as judge_files
from .candidates import Candidates
from .clip import TimeConditionedCLIP
from .pixels import scoring_pixels

STEPLESS_T = 0  # the timestep that a judge of kind spm_no_step always gets, in training and in scoring
ENCODE_BATCH = 256  # prompts per forward of the text tower
JUDGE_FILE = "judge.safetensors"  # in a checkpoint


class StepAwarePreferenceModel:
    """Scores images against prompts at a timestep: exp(logit_scale) * cos(text, image), about 100 * cosine."""

    def __init__(
        self,
        clip: TimeConditionedCLIP,
        tokenizer: CLIPTokenizer,
        mean: Sequence[float],
        std: Sequence[float],
        kind: str = "spm",
    ):
        """Takes mean and std per channel of images in [0, 1], as in preprocessor_config.json, and judge.kind."""
        self.clip = clip
        self.tokenizer = tokenizer
        self.kind = kind
        self.size = clip.config.vision_config.image_size
        self.device = clip.logit_scale.device
        self.mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(3, 1, 1)

    @property
    def network(self) -> TimeConditionedCLIP:
        """The judge's networks as one module."""
        return self.clip

    @property
    def is_plain(self) -> bool:
        """Whether it scores as a plain CLIP does, whatever the timestep."""
        return not any(v.any() for name, v in self.clip.named_parameters() if "adaLN_modulation.1.weight" in name)

    @property
    def text_networks(self) -> list[nn.Module]:
        """The networks that only `encode` needs."""
        return [self.clip.text_model, self.clip.text_projection]

    @classmethod
    def load(
        cls, judge: JudgeConfig, device: torch.device, rng: torch.Generator | None = None
    ) -> StepAwarePreferenceModel:
        """Loads a judge, frozen, in judge.dtype or float32, from any of the forms that judge/files.py reads.

        rng (on the CPU): given if the judge is to be trained. A plain CLIP is then accepted: its modulation starts as
        the identity, its timestep embedder is drawn from rng. Without rng a plain CLIP is accepted only for kind
        pickscore. Raises UserError that names what is missing or does not fit.
        """
        dtype = dtype_on(device, judge.dtype or "float32", "judge.dtype")
        files = judge_files.load(judge, rng)
        clip = files.clip.to(device).cast(dtype).freeze()
        return cls(clip, files.tokenizer, files.mean, files.std, judge.kind)

    def unfreeze(self) -> None:
        """Makes the judge ready for training: all of its CLIP is trained."""
        self.clip.requires_grad_(True).train()

    def save(self, folder: Path) -> None:
        """Writes a folder that `load` reads; it records the kind of judge."""
        self._needs_text_tower("saved")
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        judge_files.save(folder, judge_files.JudgeFiles(self.clip, self.tokenizer, mean, std), self.kind)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Computes normalised text features (N, E) of N prompts in float32; over-long prompts are truncated."""
        self._needs_text_tower("asked for text features")
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.clip.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        features = torch.cat([self.clip.text_features(part) for part in ids.split(ENCODE_BATCH)])
        return F.normalize(features.float(), dim=-1)

    def release_text_tower(self) -> None:
        """Frees the text tower's memory; `encode` and `save` then raise RuntimeError."""
        self.clip.text_model = self.clip.text_projection = None

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Scores the predicted images of K branches of B prompts: (K, B); cond: the Conditioning of these prompts."""
        return self.score_images(candidates.images, cond.judge, candidates.t)

    @torch.no_grad()
    def score_images(self, images: Tensor, text: Tensor, t: float) -> Tensor:
        """Scores images (K, B, 3, H, W) in [-1, 1] for text features (B, E) at training timestep t: (K, B)."""
        scores = self.compare(self.pixels(images.flatten(0, 1)), text.repeat(len(images), 1), t)
        return scores.view(images.shape[:2])

    def compare(self, pixels: Tensor, text: Tensor, t: Tensor | float) -> Tensor:
        """Scores normalised pixels (N, 3, S, S) and text features (N, E) at t, (N,) or one for all: (N,)."""
        image = self.clip.image_features(pixels, STEPLESS_T if self.kind == "spm_no_step" else t)
        return self.clip.logit_scale.exp() * (F.normalize(image.float(), dim=-1) * text).sum(-1)

    def pixels(self, images: Tensor) -> Tensor:
        """Converts images (N, 3, H, W) in about [-1, 1] to normalised pixels (N, 3, S, S) for scoring."""
        return scoring_pixels(self, images)

    def _needs_text_tower(self, use: str) -> None:
        if self.clip.text_model is None:
            raise RuntimeError(f"a judge without its text tower cannot be {use}; release_text_tower comes last")


@dataclass(frozen=True, slots=True)
class TrainedJudge:
    """The Trainable of a run that trains a judge."""

    network: nn.Module

    def save(self, folder: Path, iteration: int) -> None:
        """Writes folder/JUDGE_FILE, all that is trained."""
        save_tensors({name: value.detach().contiguous() for name, value in self._trained()}, folder / JUDGE_FILE)

    def load(self, folder: Path) -> None:
        """Loads the weights that `save` wrote. Raises UserError if they are not finite."""
        state = load_file(folder / JUDGE_FILE)
        check_finite(state, str(folder / JUDGE_FILE))
        with torch.no_grad():
            for name, value in self._trained():
                value.copy_(state[name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.network.named_parameters() if value.requires_grad]
