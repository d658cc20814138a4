"""Keys and values of the prompts' text, computed once for all the forwards of a rollout or an evaluated batch.

What cross-attention makes of the text depends on neither the latent nor the timestep, so that while the policy stays as
it is every step and every branch would compute the same again. In the update the policy changes, and gradients pass
through these layers: nothing here is for there. Attention itself is PyTorch's SDPA.

Stood in for are the cross-attentions of Stable Diffusion's UNets, known by their exact types. A UNet in which anything
else sees the text is left alone: it would be given row numbers in place of text.
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
PLAIN = (AttnProcessor2_0, XFormersAttnProcessor)  # what both compute is SDPA


class KeptText:
    """Attention processor of one cross-attention layer that looks its keys and values up, in place of the text."""

    def __init__(self, attn: Attention, text: Tensor):
        """attn: a layer for which `is_plain` holds; text (P, L, D): states of P prompts."""
        self.key = split_heads(attn.to_k(text), attn.heads)  # (P, H, L, d)
        self.value = split_heads(attn.to_v(text), attn.heads)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (N, S, C); encoder_hidden_states (N,) int64: which of the P prompts each row has.

        Raises ValueError for a mask, and for a text in place of row numbers.
        """
        if attention_mask is not None:
            raise ValueError("a mask was given to a cross-attention whose text is kept, which knows none; use the text")
        row = encoder_hidden_states
        if row is None or row.dtype != torch.int64 or row.shape != hidden_states.shape[:1]:
            found = None if row is None else (tuple(row.shape), row.dtype)
            raise ValueError(f"while its text is kept a UNet takes the rows' prompts, (N,) int64, but got {found}")
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        out = F.scaled_dot_product_attention(query, self.key[row], self.value[row])  # (N, H, S, d)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


@contextmanager
@torch.no_grad()
def kept_text(unet: nn.Module, text: Tensor) -> Iterator[bool]:
    """Inside, the UNet knows text (P, L, D) of P prompts, and takes (N,) int64 for it: which of them each row has.

    Gives whether that is so: a UNet with other layers than `cross_attentions` knows stays as it is and takes the text.
    The LoRA is in the keys and values as it is on entry; on leaving, the layers are as they were.
    """
    layers = cross_attentions(unet, text.shape[-1])
    former = [layer.processor for layer in layers]
    try:
        for layer in layers:
            layer.set_processor(KeptText(layer, text))
        yield bool(layers)
    finally:
        for layer, processor in zip(layers, former, strict=True):
            layer.set_processor(processor)


def cross_attentions(unet: nn.Module, width: int) -> list[Attention]:
    """Everything in a UNet that sees its text of this width; none where anything sees it that is not plain."""
    if type(unet) is not UNet2DConditionModel or unet.encoder_hid_proj is not None:
        return []
    if unet.config.addition_embed_type not in (None, "text_time"):
        return []
    blocks = [b for b in (*unet.down_blocks, *unet.up_blocks, unet.mid_block) if type(b) not in WITHOUT_TEXT]
    if not all(type(block) in WITH_TEXT for block in blocks):
        return []
    transformers = [transformer for block in blocks for transformer in block.attentions]
    if not all(type(each) is Transformer2DModel and each.is_input_continuous for each in transformers):
        return []
    parts = [part for transformer in transformers for part in transformer.transformer_blocks]
    if not all(type(part) is BasicTransformerBlock and not part.only_cross_attention for part in parts):
        return []
    layers = [part.attn2 for part in parts]
    return layers if all(is_plain(layer, width) for layer in layers) else []


def is_plain(attn: nn.Module, width: int) -> bool:
    """Whether it is diffusers' Attention with projections of a text of this width and SDPA, and no more."""
    if type(attn) is not Attention or type(attn.processor) not in PLAIN:
        return False
    norms = attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k
    added = attn.added_kv_proj_dim is not None or attn.residual_connection or attn.rescale_output_factor != 1
    sees_text = attn.is_cross_attention and attn.cross_attention_dim == width
    alike = attn.scale_qk and attn.inner_kv_dim == attn.inner_dim and not attn.fused_projections
    return sees_text and alike and not added and all(norm is None for norm in norms)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, S, heads * d) -> (N, heads, S, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
