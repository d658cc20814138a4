"""Embeddings of prompts as plain tensors; latent_diffusion.py and judge/model.py compute them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rows import Rows, rows


@dataclass(frozen=True, slots=True)
class Conditioning(Rows):
    """Embeddings of N prompts, and of the empty (negative) prompt.

    text (N, L, D): hidden states of the text encoder, or of two side by side; null (1, L, D): those of the empty
    prompt. judge, auditor (N, E): what the `encode` of either makes of the text. Where the UNet takes them: pooled
    (N, P), null_pooled (1, P), and time_ids (1, 6), or (M, 6) for M latents: original size, crop, target size. row (N,)
    int64: each prompt's row in the texts that speed/text_kv.py caches; row 0 is the empty prompt's.
    """

    text: Tensor = rows()
    null: Tensor = rows(None)
    judge: Tensor | None = rows(default=None)
    pooled: Tensor | None = rows(default=None)
    null_pooled: Tensor | None = rows(None, default=None)
    time_ids: Tensor | None = rows(None, default=None)
    row: Tensor | None = rows(default=None)
    auditor: Tensor | None = rows(default=None)

    def unprompted(self) -> Conditioning:
        """Returns a copy in which each of the N prompts is replaced by the empty prompt."""
        changed = {"text": self.null.expand_as(self.text)}
        if self.pooled is not None:
            changed["pooled"] = self.null_pooled.expand_as(self.pooled)
        if self.row is not None:
            changed["row"] = torch.zeros_like(self.row)
        return replace(self, **changed)
