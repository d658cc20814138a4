"""plan/unit_costs: costs are proportional to rows; the FLOPs of the full-size networks; bytes of weights on disk."""

import pytest
import torch
from safetensors.torch import load_file

from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import checkpointed, measure
from strop.engine.plan.unit_costs import (
    Networks,
    judge_costs,
    measure_decode,
    measure_sampling,
    text_costs,
    unet_costs,
    weight_bytes,
)

ROW = 2


@pytest.fixture
def tiny(make_config, tiny_sdxl_folder, clip_folder):
    return ModelBuilder.of(make_config(tiny_sdxl_folder, clip_folder, optim={"micro_batch": 3}))


@pytest.mark.parametrize("rows", [3, 8])
def test_a_forward_grows_with_its_rows(tiny, rows):
    policy = tiny.policy()
    x = lambda n: torch.empty(n, *policy.latent_shape, device="meta")
    t = lambda n: torch.zeros(n, dtype=torch.int64, device="meta")
    with torch.no_grad():
        one, many = (measure(lambda n=n: policy.eps(x(n), t(n), tiny.conditioning(n))) for n in (1, rows))
    assert many.flops.all == rows * one.flops.all
    assert many.peak == pytest.approx(rows * one.peak, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_an_update_grows_with_its_rows(tiny, checkpointing):
    policy, schedule, n = tiny.policy(), tiny.schedule("meta"), 6
    costs = unet_costs(tiny, policy)
    policy.unet.disable_gradient_checkpointing()
    if checkpointing:
        policy.unet.enable_gradient_checkpointing(checkpointed)
    x = torch.empty(2, n, *policy.latent_shape, device="meta")
    index = torch.zeros(n, dtype=torch.int64, device="meta")
    pairs = PreferencePairs(x, x.clone(), index, index, index.bool())
    batch, learner = MicroBatch(pairs, 2, tiny.conditioning(1)), Learner(policy, schedule, tiny.config.optim)
    update = measure(lambda: learner.loss(batch)[0].backward())
    rows = ROW * (2 * n - 2)  # two of the pairs share their latent
    each = costs.train + costs.reference + costs.recompute * checkpointing
    assert update.flops.all == pytest.approx(rows * each.all, rel=1e-9)
    peak = costs.checkpointed_peak if checkpointing else costs.update_peak
    assert update.peak == pytest.approx(rows * peak, rel=0.05)


def test_weights_are_those_on_disk(tiny, tiny_sdxl_folder):
    weights = weight_bytes(Networks.of(tiny))

    def size(*parts):
        files = [file for part in parts for file in (tiny_sdxl_folder / part).glob("*.safetensors")]
        return sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    assert weights.unet == size("unet")
    assert weights.vae_decoder + weights.vae_encoder == size("vae")
    # position_ids is a buffer of both, and in no file
    assert weights.text_encoders == pytest.approx(size("text_encoder", "text_encoder_2"), abs=2 * 8 * 16)


@pytest.mark.parametrize(
    "family, forward, decode, text",
    [("stable-diffusion", 0.80, 2.51, 0.0133), ("sdxl", 6.76, 10.5, 0.111)],
    ids=["sd15", "sdxl"],
)
def test_the_full_size_networks(make_config, family, forward, decode, text):
    builder = ModelBuilder.of(make_config(f"somebody/{family}", model={"dtype": "float16"}))
    policy, diffusion, judge = builder.policy(), builder.diffusion(), builder.judge()
    x = torch.empty(1, *policy.latent_shape, device="meta")
    with policy.reference():
        merge, text_kv, guided, _ = measure_sampling(policy, x, builder.conditioning(1), cache_text=False)
    assert (merge.flops.all, text_kv.flops.all) == (0, 0)
    tera = lambda flops: flops.all / 1e12
    assert tera(guided.flops) / ROW == pytest.approx(forward, rel=0.01)
    assert tera(measure_decode(diffusion, policy.latent_shape).flops) == pytest.approx(decode, rel=0.01)
    images = judge_costs(builder, judge, torch.empty(1, 3, 512, 512, device="meta", dtype=torch.float16))
    texts = text_costs(diffusion) | images
    assert tera(texts["text"]) == pytest.approx(text, rel=0.01)
    assert tera(texts["judge_text"]) == pytest.approx(0.047, rel=0.01)
    assert tera(images["judge"]) == pytest.approx(0.335, rel=0.01)
    assert images["judge"].tf32 > 0.99 * images["judge"].all


def test_the_published_lora_has_as_many_numbers(make_config):
    trained = lambda path, rank: ModelBuilder.of(make_config(path, lora={"rank": rank})).policy().parameters
    assert sum(p.numel() for p in trained("somebody/sd", 4)) == pytest.approx(0.80e6, rel=0.01)
    assert sum(p.numel() for p in trained("somebody/sdxl", 64)) == pytest.approx(92.9e6, rel=0.01)
