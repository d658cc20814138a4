"""What the models know of some prompts, as plain tensors; latent_diffusion.py and judge/model.py make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

ALIKE = ("null", "null_pooled", "time_ids")  # the same for all prompts, hence one row


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Embeddings of N prompts, and of the empty (negative) prompt.

    text (N, L, D): hidden states of the text encoders; null (1, L, D): those of the empty prompt. For a UNet that takes
    more, else None: pooled (N, P) text, null_pooled (1, P), and time_ids (1, 6): original size, crop, target size.
    judge (N, E): the judge's text features. row (N,) int64: where text_kv.py keeps what a UNet makes of each prompt's
    text; null's is row 0.
    """

    text: Tensor
    null: Tensor
    judge: Tensor | None = None
    pooled: Tensor | None = None
    null_pooled: Tensor | None = None
    time_ids: Tensor | None = None
    row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self.map(lambda value: value[rows])

    def repeat(self, k: int) -> Conditioning:
        """k copies, one after the other: row j * N + i is prompt i."""
        return self.map(lambda value: value.repeat(k, *[1] * (value.ndim - 1)))

    def unprompted(self) -> Conditioning:
        """The empty prompt in place of each of the N."""
        given = {"text": self.null.expand_as(self.text)}
        if self.pooled is not None:
            given["pooled"] = self.null_pooled.expand_as(self.pooled)
        if self.row is not None:
            given["row"] = torch.zeros_like(self.row)
        return replace(self, **given)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """With `function` of each tensor that has one row a prompt."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ALIKE}
        return replace(self, **{name: function(value) for name, value in given.items() if value is not None})

    def with_judge(self, features: Tensor) -> Conditioning:
        return replace(self, judge=features)

    def to(self, target: torch.device | torch.dtype, non_blocking: bool = False) -> Conditioning:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = lambda value: None if value is None else value.to(target, non_blocking=non_blocking)
        return Conditioning(**{name: moved(value) for name, value in given.items()})
