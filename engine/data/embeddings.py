"""Computes the embeddings of all prompts of a run once and stores them on the host, so that text encoders can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..judge.find import AnyJudge
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import BATCH, LatentDiffusion
from ..runtime.ranks import Ranks
from .prompts import batch_of


class Embeddings:
    """Embeddings of each prompt by base model and judges: `embeddings[prompts]` is a Conditioning on the device."""

    def __init__(
        self,
        diffusion: LatentDiffusion,
        judge: AnyJudge,
        groups: Sequence[Sequence[str]],
        auditor: AnyJudge | None = None,
    ):
        """Encodes the prompts of all groups, which are disjoint; the batches of one group do not depend on the others.

        The text encoders are not needed afterwards.
        """
        self.device = diffusion.device
        self.row = {prompt: row for row, prompt in enumerate(prompt for group in groups for prompt in group)}
        judges = {"judge": judge} | ({"auditor": auditor} if auditor else {})
        self.all = Conditioning.cat([self._encode(diffusion, judges, group) for group in groups if group])

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, prompts: Sequence[str]) -> Conditioning:
        rows = self.all[torch.tensor([self.row[prompt] for prompt in prompts])]
        return rows.to(self.device, non_blocking=True)  # safe: nothing writes to the copied tensors

    @staticmethod
    def _encode(diffusion: LatentDiffusion, judges: Mapping[str, AnyJudge], prompts: Sequence[str]) -> Conditioning:
        batches, host = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)], torch.device("cpu")
        with torch.no_grad():
            features = {name: torch.cat([judge.encode(batch) for batch in batches]) for name, judge in judges.items()}
        return replace(diffusion.encode(prompts, onto=host), **features).to(host)


@dataclass(frozen=True, slots=True)
class TrainingPrompts:
    """Deals the training prompts of each iteration, `per_rank` to each rank, with their embeddings."""

    prompts: list[str]
    embeddings: Embeddings
    per_rank: int
    seed: int
    ranks: Ranks

    def mine(self, iteration: int) -> Conditioning:
        """Returns the Conditioning of this rank's prompts of an iteration."""
        return self.embeddings[self.texts(iteration)]

    def texts(self, iteration: int) -> list[str]:
        """Returns this rank's prompts of an iteration."""
        begin = self.ranks.rank * self.per_rank
        return self.of_all(iteration)[begin : begin + self.per_rank]

    def everyone(self, iteration: int) -> Conditioning:
        """Returns the Conditioning of all ranks' prompts of an iteration, in rank order."""
        return self.embeddings[self.of_all(iteration)]

    def of_all(self, iteration: int) -> list[str]:
        """Returns all ranks' prompts of an iteration, in rank order."""
        return batch_of(self.prompts, iteration, self.per_rank * self.ranks.size, self.seed)
