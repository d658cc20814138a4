"""plan/unit_costs: one row tells of all; the counts of the full-size networks; weights as they lie on disk."""

import pytest
import torch
from safetensors.torch import load_file

from strop.engine.config.training import Config
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.plan.meta_models import Blueprint
from strop.engine.plan.meter import checkpointed, gauge
from strop.engine.plan.unit_costs import Networks, decoding, of_judge, of_text, sampling, unet_prices, weigh

ROW = 2


def config(path, judge="none", **sections):
    given = {
        "model": {"path": str(path)} | sections.pop("model", {}),
        "judge": {"path": str(judge)},
        "prompts": {"train": "none"},
        "run": {"dir": "none", "iterations": 1},
    }
    return Config.model_validate(given | sections)


@pytest.fixture
def tiny(tiny_sdxl_folder, clip_folder):
    return Blueprint.of(config(tiny_sdxl_folder, clip_folder, optim={"micro_batch": 3}))


@pytest.mark.parametrize("rows", [3, 8])
def test_a_forward_grows_with_its_rows(tiny, rows):
    policy = tiny.policy()
    x = lambda n: torch.empty(n, *policy.latent_shape, device="meta")
    t = lambda n: torch.zeros(n, dtype=torch.int64, device="meta")
    with torch.no_grad():
        one, many = (gauge(lambda n=n: policy.eps(x(n), t(n), tiny.conditioning(n))) for n in (1, rows))
    assert many.flops.all == rows * one.flops.all
    assert many.peak == pytest.approx(rows * one.peak, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_an_update_grows_with_its_rows(tiny, checkpointing):
    policy, schedule, n = tiny.policy(), tiny.schedule("meta"), 6
    price = unet_prices(tiny, policy)
    policy.unet.disable_gradient_checkpointing()
    if checkpointing:
        policy.unet.enable_gradient_checkpointing(checkpointed)
    x = torch.empty(2, n, *policy.latent_shape, device="meta")
    index = torch.zeros(n, dtype=torch.int64, device="meta")
    pairs = PreferencePairs(x, x.clone(), index, index, index.bool())
    batch, learner = MicroBatch(pairs, 2, tiny.conditioning(1)), Learner(policy, schedule, tiny.config.optim)
    found = gauge(lambda: learner.loss(batch)[0].backward())
    rows = ROW * (2 * n - 2)  # two of the pairs share their latent
    each = price.train + price.reference + price.recompute * checkpointing
    assert found.flops.all == pytest.approx(rows * each.all, rel=1e-9)
    assert found.peak == pytest.approx(
        rows * (price.checkpointed_peak if checkpointing else price.update_peak), rel=0.05
    )


def test_weights_are_those_on_disk(tiny, tiny_sdxl_folder):
    found = weigh(Networks.of(tiny))

    def size(*parts):
        files = [file for part in parts for file in (tiny_sdxl_folder / part).glob("*.safetensors")]
        return sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    assert found.unet == size("unet")
    assert found.vae_decoder + found.vae_encoder == size("vae")
    # position_ids is a buffer of both, and in no file
    assert found.text_encoders == pytest.approx(size("text_encoder", "text_encoder_2"), abs=2 * 8 * 16)


@pytest.mark.parametrize(
    "family, forward, decode, text",
    [("stable-diffusion", 0.80, 2.51, 0.0133), ("sdxl", 6.76, 10.5, 0.111)],
    ids=["sd15", "sdxl"],
)
def test_the_full_size_networks(family, forward, decode, text):
    blueprint = Blueprint.of(config(f"somebody/{family}", model={"dtype": "float16"}))
    policy, diffusion, judge = blueprint.policy(), blueprint.diffusion(), blueprint.judge()
    x = torch.empty(1, *policy.latent_shape, device="meta")
    with policy.reference():
        merge, keep, sample, _ = sampling(policy, x, blueprint.conditioning(1), text_kv=False)
    assert (merge.flops.all, keep.flops.all) == (0, 0)
    tera = lambda reading: reading.flops.all / 1e12
    assert tera(sample) / ROW == pytest.approx(forward, rel=0.01)
    assert tera(decoding(diffusion, policy.latent_shape)) == pytest.approx(decode, rel=0.01)
    found = of_text(diffusion, judge)
    assert found["text"].all / 1e12 == pytest.approx(text, rel=0.01)
    assert found["judge_text"].all / 1e12 == pytest.approx(0.047, rel=0.01)
    found = of_judge(judge, torch.empty(1, 3, 512, 512, device="meta", dtype=torch.float16), tf32=True)
    assert found["judge"].all / 1e12 == pytest.approx(0.335, rel=0.01)
    assert found["judge"].tf32 > 0.99 * found["judge"].all


def test_the_published_lora_has_as_many_numbers():
    trained = lambda path, rank: Blueprint.of(config(path, lora={"rank": rank})).policy().parameters
    assert sum(p.numel() for p in trained("somebody/sd", 4)) == pytest.approx(0.80e6, rel=0.01)
    assert sum(p.numel() for p in trained("somebody/sdxl", 64)) == pytest.approx(92.9e6, rel=0.01)
