"""Keys and values of the prompts' text, computed once for all the forwards of a rollout or an evaluated batch.

What cross-attention makes of the text depends on neither the latent nor the timestep, so that while the policy stays as
it is every step and every branch would compute the same again. In the update the policy changes, and gradients pass
through these layers: nothing here is for there. Attention itself is PyTorch's SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeptText:
    """Attention processor of one cross-attention layer that looks its keys and values up, in place of the text."""

    def __init__(self, attn: nn.Module, text: Tensor):
        """attn: diffusers' Attention; text (P, L, D): states of P prompts."""
        self.key = split_heads(attn.to_k(text), attn.heads)  # (P, H, L, d)
        self.value = split_heads(attn.to_v(text), attn.heads)

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_) -> Tensor:
        """hidden_states (N, S, C); encoder_hidden_states (N,) int64: which of the P prompts each row has."""
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = self.key[encoder_hidden_states], self.value[encoder_hidden_states]
        out = F.scaled_dot_product_attention(query, key, value)  # (N, H, S, d)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@contextmanager
@torch.no_grad()
def kept_text(unet: nn.Module, text: Tensor) -> Iterator[None]:
    """Inside, the UNet knows text (P, L, D) of P prompts, and takes (N,) int64 for it: which of them each row has.

    The LoRA is in the keys and values as it is on entry; on leaving, the layers are as they were.
    """
    layers = [m for name, m in unet.named_modules() if name.endswith(".attn2")]
    former = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.processor = KeptText(layer, text)
        yield
    finally:
        for layer, processor in zip(layers, former, strict=True):
            layer.processor = processor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, S, heads * d) -> (N, heads, S, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
