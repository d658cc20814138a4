"""strop.engine.speed.text_kv: the UNet with its keys and values kept gives what it gives with the text."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from strop.engine.speed.text_kv import CachedText, cached_text, cross_attentions, is_plain

K, PROMPTS = 3, 3  # branches of each, and how many prompts the model's Conditioning has
ROUNDING = 1e-5  # absolute, at outputs of about 1


def branches(k=K):
    x = torch.randn(k * PROMPTS, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.full((len(x),), 501)


def test_the_layers_are_as_they_were_afterwards_also_after_an_exception(model):
    policy, cond = model
    x, t = branches(1)
    before, former = policy.eps(x, t, cond), dict(policy.unet.attn_processors)
    with pytest.raises(RuntimeError, match="in between"):
        with policy.sampling(cond, text_kv=True):
            raise RuntimeError("in between")
    assert policy.unet.attn_processors == former
    after = policy.eps(x, t, cond)
    assert torch.equal(before, after)
    assert after.requires_grad


@torch.no_grad()
def test_unprompted_rows_are_the_guided_forwards_other_half(model):
    """With and without text kept, a forward of the empty prompt alone gives what both halves at once give for it."""
    policy, cond = model
    x, t = branches()
    with policy.sampling(cond, text_kv=True):
        pass  # what was kept is of the policy as it was then
    for p in policy.parameters:
        p.mul_(0.5)
    both = policy.eps(x, t, cond.repeat(K))
    with policy.sampling(cond, text_kv=True) as known:
        cached = policy.eps(x, t, known.repeat(K).unprompted(), guided=False)
    plain = policy.eps(x, t, cond.repeat(K).unprompted(), guided=False)
    for actual in (cached, plain):
        torch.testing.assert_close(actual, both[:1], rtol=0, atol=ROUNDING)
    assert (both[1] - both[0]).abs().max() > 100 * ROUNDING


@torch.no_grad()
def test_no_step_computes_keys_and_values_of_the_text(model):
    """What a step saves is 2 L D C multiplications and additions, and the LoRA's, of every row and cross-attention."""
    policy, cond = model
    x, t = branches(1)
    with FlopCounterMode(display=False) as plain:
        policy.eps(x, t, cond)
    with policy.sampling(cond, text_kv=True) as known, FlopCounterMode(display=False) as cached:
        policy.eps(x, t, known)
    rows, length, width = 2 * len(x), *cond.text.shape[1:]
    layers = cross_attentions(policy.unet, width)
    each = [2 * (width * m.inner_dim + 4 * (width + m.inner_dim)) * rows * length for m in layers]
    assert plain.get_total_flops() - cached.get_total_flops() == 2 * sum(each)


@pytest.mark.parametrize("family, layers", [("sd15", 16), ("sdxl", 70)])
def test_every_layer_of_the_full_size_models_that_sees_the_text_is_known(architectures, family, layers):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architectures[family]["unet"])
    assert len(cross_attentions(unet, unet.config.cross_attention_dim)) == layers
    assert not cross_attentions(unet, 5)


@torch.no_grad()
def test_a_mask_and_a_text_are_refused_while_the_text_is_kept(model):
    policy, cond = model
    with policy.sampling(cond, text_kv=True):
        layer = cross_attentions_of(policy.unet)[0]
        hidden, row = torch.zeros(3, 4, layer.query_dim), torch.arange(3)
        mask = torch.zeros(3, 1, cond.text.shape[1])
        with pytest.raises(ValueError, match="mask"):
            layer(hidden, encoder_hidden_states=row, attention_mask=mask)
        for text in (cond.text, None, row[:2]):
            with pytest.raises(ValueError, match="rows"):
                layer(hidden, encoder_hidden_states=text)


def cross_attentions_of(unet):
    return [m for m in unet.modules() if type(m) is Attention and m.is_cross_attention]


class Foreign(AttnProcessor2_0):
    """As an IP-adapter's or somebody's own: it may do more than SDPA."""


class ForeignAttention(Attention):
    pass


CHANGES = {
    "processor": lambda layer: layer.set_processor(Foreign()),
    "older processor": lambda layer: layer.set_processor(AttnProcessor()),
    "class": lambda layer: setattr(layer, "__class__", ForeignAttention),
    "norm of the text": lambda layer: setattr(layer, "norm_cross", torch.nn.LayerNorm(layer.cross_attention_dim)),
    "norm of queries": lambda layer: setattr(layer, "norm_q", torch.nn.Identity()),
    "residual": lambda layer: setattr(layer, "residual_connection", True),
    "rescaling": lambda layer: setattr(layer, "rescale_output_factor", 2.0),
    "scale": lambda layer: setattr(layer, "scale_qk", False),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_with_one_layer_that_is_not_known_the_text_travels_as_it_is(model, change):
    policy, cond = model
    x, t = branches(1)
    layer = cross_attentions_of(policy.unet)[1]
    CHANGES[change](layer)
    assert not is_plain(layer, cond.text.shape[-1])
    expected = policy.eps(x, t, cond)
    with policy.sampling(cond, text_kv=True) as known:
        assert known is cond
        assert not any(isinstance(p, CachedText) for p in policy.unet.attn_processors.values())
        assert torch.equal(policy.eps(x, t, known), expected)


ELSEWHERE = [
    {"encoder_hid_dim": 7, "encoder_hid_dim_type": "text_proj"},
    {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    {"dual_cross_attention": True},
    {"only_cross_attention": True},
    {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
    {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
]


@pytest.mark.parametrize("keys", ELSEWHERE, ids=str)
@torch.no_grad()
def test_a_unet_in_which_the_text_is_seen_elsewhere_is_left_as_it_is(keys):
    small = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 2}
    plain = UNet2DConditionModel(cross_attention_dim=6, **small | kinds)
    assert len(cross_attentions(plain, 6)) == 2
    unet = UNet2DConditionModel(cross_attention_dim=6, **small | kinds | keys)
    former = dict(unet.attn_processors)
    with cached_text(unet, torch.zeros(2, 3, 6)) as cached:
        assert not cached
        assert unet.attn_processors == former
