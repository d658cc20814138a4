"""speed/shared_halves: with what the halves have in common computed once, a forward is the same and costs less."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.models.families.find import family_named
from strop.engine.models.guided_unet import Savings
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import measure
from strop.engine.speed.shared_halves import before_text


def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([801, 501, 1])


def test_a_forward_is_shared_only_where_it_is_asked_for(model):
    """Afterwards, and after an exception, rows that are no halves of one another are treated as such."""
    policy, cond = model
    x, t = latents()
    expected = policy.eps(x, t, cond, guided=False)
    policy.savings = Savings(share_halves=True)
    with pytest.raises(RuntimeError, match="size of tensor"):
        policy.eps(x, t, cond[:2])
    torch.testing.assert_close(policy.eps(x, t, cond, guided=False), expected, rtol=0, atol=0)


CHANNELS, PIXELS = 320, 64 * 64  # of SD-1.5 at its full resolution
CONVOLUTIONS = 2 * 9 * (4 * CHANNELS + 2 * CHANNELS**2) * PIXELS  # the first, and those of the first residual block
TIMESTEP = 2 * 1280 * CHANNELS
ATTENTION = 4 * 2 * CHANNELS**2 * PIXELS + 2 * 2 * PIXELS**2 * CHANNELS


def test_what_it_saves_of_sd15_at_full_size():
    """Of a guided forward, what one half has before the text; norms and a projection before it are not shared."""
    config = SPOConfig.model_validate(
        {
            "model": {"path": "nobody/sd15", "dtype": "float16"},
            "judge": {"path": "nobody/judge"},
            "prompts": {"train": "none"},
            "run": {"dir": "none", "iterations": 1},
        }
    )
    builder = ModelBuilder.of(config, family_named("sd15"))
    policy, cond = builder.policy(), builder.conditioning(1)
    x, t = torch.empty(1, *builder.latent_shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    policy.savings = Savings(merge_lora=True)
    with policy.sampling(cond, text_kv=False):
        apart = measure(lambda: policy.eps(x, t, cond))
        policy.savings = Savings(merge_lora=True, share_halves=True)
        shared = measure(lambda: policy.eps(x, t, cond))
    saved = apart.flops.all - shared.flops.all
    assert saved == CONVOLUTIONS + TIMESTEP + ATTENTION
    assert 0.02 < saved / apart.flops.all < 0.03
    assert shared.peak <= apart.peak


def test_nothing_of_sdxl_is_shared(architectures):
    with torch.device("meta"):
        assert before_text(UNet2DConditionModel.from_config(architectures["sdxl"]["unet"])) == []


@pytest.mark.parametrize(
    "first, only, shared",
    [
        ("CrossAttnDownBlock2D", False, 3),  # the first convolution, a residual block, a self-attention
        ("CrossAttnDownBlock2D", True, 1),  # attn1 sees the text too
        ("SimpleCrossAttnDownBlock2D", False, 1),
        ("AttnDownBlock2D", False, 1),
        ("DownBlock2D", False, 3),  # and the second block is not known
    ],
)
def test_it_ends_where_a_block_is_not_known(first, only, shared):
    unet = UNet2DConditionModel(
        down_block_types=(first, "DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D",) * 3,
        only_cross_attention=only,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
    )
    assert len(before_text(unet)) == shared
