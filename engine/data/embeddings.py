"""Embeddings of all prompts of a run: made once and kept on the host, so that text encoders can leave the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from ..judge.model import StepAwarePreferenceModel
from ..models.conditioning import ALIKE, Conditioning
from ..models.latent_diffusion import BATCH, LatentDiffusion


class Embeddings:
    """What base model and judge know of each prompt: `embeddings[prompts]` is their Conditioning, on the device."""

    def __init__(self, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, groups: Sequence[Sequence[str]]):
        """Encodes the prompts of all groups, which have none in common; the batches of one do not depend on the others.

        The text encoders are no longer needed then, here or elsewhere.
        """
        self.device = diffusion.device
        self.row = {prompt: row for row, prompt in enumerate(prompt for group in groups for prompt in group)}
        parts = [self._encode(diffusion, judge, group) for group in groups]
        self.all = Conditioning(**{field.name: self._whole(parts, field.name) for field in fields(Conditioning)})

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, prompts: Sequence[str]) -> Conditioning:
        found = self.all[torch.tensor([self.row[prompt] for prompt in prompts])]
        return found.to(self.device, non_blocking=True)  # nothing writes what is on its way

    @staticmethod
    def _encode(diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, prompts: Sequence[str]) -> Conditioning:
        with torch.no_grad():
            features = [judge.encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        host = torch.device("cpu")
        return diffusion.encode(prompts, onto=host).with_judge(torch.cat(features)).to(host)

    @staticmethod
    def _whole(parts: list[Conditioning], name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return values[0] if name in ALIKE or values[0] is None else torch.cat(values)
