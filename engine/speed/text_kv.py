"""Computes the text's keys and values once for all forwards of a rollout or of an evaluated batch.

Cross-attention keys and values depend on neither the latent nor the timestep, so every step and branch would compute
them again. The update cannot use this: there the policy changes and gradients pass through these layers. Attention
itself is PyTorch's SDPA.

Only the cross-attentions of Stable Diffusion's UNets are replaced, recognised by their exact types. A UNet in which
anything else sees the text is left unchanged, because it would get row numbers instead of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import Tensor, nn

WITH_TEXT = (CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, CrossAttnUpBlock2D)
WITHOUT_TEXT = (DownBlock2D, UpBlock2D)
SDPA_PROCESSORS = (AttnProcessor2_0, XFormersAttnProcessor)


class CachedText:
    """An attention processor that looks up keys and values of one cross-attention layer by row number."""

    def __init__(self, attn: Attention, text: Tensor):
        """Computes keys and values of text (P, L, D), states of P prompts, for a layer for which `is_plain` holds."""
        self.key = split_heads(attn.to_k(text), attn.heads)  # (P, H, L, d)
        self.value = split_heads(attn.to_v(text), attn.heads)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends with hidden_states (N, S, C); encoder_hidden_states (N,) int64: which of the P prompts each row has.

        Returns (N, S, C). Raises ValueError for a mask, and for a text in place of row numbers.
        """
        if attention_mask is not None:
            raise ValueError("a cross-attention with cached text got a mask, which it does not support; pass the text")
        row = encoder_hidden_states
        if row is None or row.dtype != torch.int64 or row.shape != hidden_states.shape[:1]:
            got = None if row is None else (tuple(row.shape), row.dtype)
            raise ValueError(f"a UNet with cached text takes the rows' prompts, (N,) int64, but got {got}")
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        out = F.scaled_dot_product_attention(query, self.key[row], self.value[row])  # (N, H, S, d)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


@contextmanager
@torch.no_grad()
def cached_text(unet: nn.Module, text: Tensor) -> Iterator[bool]:
    """Opens a context in which the UNet has cached text (P, L, D) of P prompts and takes each row's prompt, (N,) int64.

    It yields whether that is so: a UNet with layers that `cross_attentions` does not know is left unchanged and takes
    the text. The keys and values contain the LoRA as it is on entry; on exit the layers get their processors back.
    """
    layers = cross_attentions(unet, text.shape[-1])
    processors = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(CachedText(layer, text))
        yield bool(layers)
    finally:
        for layer, processor in zip(layers, processors, strict=True):
            layer.set_processor(processor)


def cross_attentions(unet: nn.Module, width: int) -> list[Attention]:
    """Lists the cross-attentions that see a UNet's text of this width; none if anything else sees it."""
    if type(unet) is not UNet2DConditionModel or unet.encoder_hid_proj is not None:
        return []
    if unet.config.addition_embed_type not in (None, "text_time"):
        return []
    blocks = [b for b in (*unet.down_blocks, *unet.up_blocks, unet.mid_block) if type(b) not in WITHOUT_TEXT]
    if not all(type(block) in WITH_TEXT for block in blocks):
        return []
    transformers = [transformer for block in blocks for transformer in block.attentions]
    if not all(type(t) is Transformer2DModel and t.is_input_continuous for t in transformers):
        return []
    parts = [part for transformer in transformers for part in transformer.transformer_blocks]
    if not all(type(part) is BasicTransformerBlock and not part.only_cross_attention for part in parts):
        return []
    layers = [part.attn2 for part in parts]
    return layers if all(is_plain(layer, width) for layer in layers) else []


def is_plain(attn: nn.Module, width: int) -> bool:
    """Whether `attn` is diffusers' Attention on a text of this width with SDPA and nothing beyond."""
    if type(attn) is not Attention or type(attn.processor) not in SDPA_PROCESSORS:
        return False
    norms = attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k
    added = attn.added_kv_proj_dim is not None or attn.residual_connection or attn.rescale_output_factor != 1
    sees_text = attn.is_cross_attention and attn.cross_attention_dim == width
    alike = attn.scale_qk and attn.inner_kv_dim == attn.inner_dim and not attn.fused_projections
    return sees_text and alike and not added and all(norm is None for norm in norms)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Splits heads: (N, S, heads * d) -> (N, heads, S, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
