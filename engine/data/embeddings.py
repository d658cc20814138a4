"""Embeddings of all prompts of a run: made once and kept on the host, so that text encoders can leave the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..judge.model import StepAwarePreferenceModel
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import BATCH, LatentDiffusion
from ..runtime.ranks import Ranks
from .prompts import batch_of


class Embeddings:
    """What base model and judge know of each prompt: `embeddings[prompts]` is their Conditioning, on the device."""

    def __init__(self, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, groups: Sequence[Sequence[str]]):
        """Encodes the prompts of all groups, which have none in common; the batches of one do not depend on the others.

        The text encoders are no longer needed then, here or elsewhere.
        """
        self.device = diffusion.device
        self.row = {prompt: row for row, prompt in enumerate(prompt for group in groups for prompt in group)}
        parts = [self._encode(diffusion, judge, group) for group in groups]
        self.all = Conditioning.cat(parts)

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
        return replace(diffusion.encode(prompts, onto=host), judge=torch.cat(features)).to(host)


@dataclass(frozen=True, slots=True)
class TrainingPrompts:
    """Which prompts belong to which iteration, `each` on every rank, and what the models know of them."""

    prompts: list[str]
    embeddings: Embeddings
    each: int
    seed: int
    ranks: Ranks

    def mine(self, iteration: int) -> Conditioning:
        """This rank's prompts of an iteration."""
        begin = self.ranks.rank * self.each
        return self.embeddings[self._of_all(iteration)[begin : begin + self.each]]

    def everyone(self, iteration: int) -> Conditioning:
        """All ranks' prompts of an iteration, in rank order."""
        return self.embeddings[self._of_all(iteration)]

    def _of_all(self, iteration: int) -> list[str]:
        return batch_of(self.prompts, iteration, self.each * self.ranks.size, self.seed)
