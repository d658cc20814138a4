"""plan/unit_costs: costs are proportional to rows, and one measurement holds for all resolutions; the FLOPs of the
full-size networks; bytes of weights on disk."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from strop.engine.config.settings import varied
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.plan import unit_costs
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import checkpointed, measure
from strop.engine.plan.unit_costs import Costs

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
    costs, schedule, n = Costs(tiny), tiny.schedule("meta"), 6
    flops, peak, policy = costs.update(checkpointing).flops, costs.update(checkpointing).peak, costs.policy
    if checkpointing:
        policy.unet.enable_gradient_checkpointing(checkpointed)
    x = torch.empty(2, n, *policy.latent_shape, device="meta")
    index = torch.zeros(n, dtype=torch.int64, device="meta")
    pairs = PreferencePairs(x, x.clone(), index, index, index.bool())
    batch, learner = MicroBatch(pairs, 2, tiny.conditioning(1)), Learner(policy, schedule, tiny.config.optim)
    update = measure(lambda: learner.loss(batch)[0].backward())
    rows = ROW * (2 * n - 2)  # two of the pairs share their latent
    assert update.flops.all == pytest.approx(rows * flops.all, rel=1e-9)
    assert update.peak == pytest.approx(rows * peak, rel=0.05)


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_sdxl_folder"], ids=["sd15", "sdxl"])
def test_one_measurement_of_the_unet_holds_for_all_resolutions(make_config, request, monkeypatch, folder):
    """Operations and bytes are those of a measurement at the resolution itself, to the last one."""
    builder = ModelBuilder.of(make_config(request.getfixturevalue(folder)))
    costs = Costs(builder)

    def all_of(costs):
        rows = [costs.sampled(), costs.sampled(False), costs.text_kv(), costs.merge(), costs.decode()]
        return [*rows, costs.update(False), costs.update(True), costs.predicted(False), costs.predicted(True)]

    for height, width in ((16, 16), (48, 32), (128, 128)):
        resized = replace(builder, config=varied(builder.config, {"model.height": height, "model.width": width}))
        elsewhere, there = costs.at(resized), costs.at(resized)
        there.known = {}
        with monkeypatch.context() as patch:
            patch.setattr(unit_costs, "SIDES", [side // builder.multiple for side in resized.latent_shape[1:]])
            full = all_of(there)
        assert all_of(elsewhere) == full


def test_weights_are_those_on_disk(tiny, tiny_sdxl_folder):
    weights = Costs(replace(tiny, config=varied(tiny.config, {"model.fold_upsample": False}))).weights

    def size(*parts):
        files = [file for part in parts for file in (tiny_sdxl_folder / part).glob("*.safetensors")]
        return sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    assert weights["UNet"] == size("unet")
    assert weights["VAE decoder"] + weights["VAE encoder"] == size("vae")
    # position_ids is a buffer of both, and in no file
    assert weights["text encoders"] == pytest.approx(size("text_encoder", "text_encoder_2"), abs=2 * 8 * 16)


@pytest.mark.parametrize(
    "family, forward, decode, text",
    [("stable-diffusion", 0.80, 2.51, 0.0133), ("sdxl", 6.76, 10.5, 0.111)],
    ids=["sd15", "sdxl"],
)
def test_the_full_size_networks(make_config, family, forward, decode, text):
    builder = ModelBuilder.of(make_config(f"somebody/{family}", model={"dtype": "float16"}))
    costs = Costs(builder, published=True)
    tera = lambda flops: flops.all / 1e12
    assert tera(costs.published["reference"]) == pytest.approx(forward, rel=0.01)
    assert tera(costs.published["decode"]) == pytest.approx(decode, rel=0.01)
    assert tera(costs.text.flops) == pytest.approx(text, rel=0.01)
    assert tera(costs.judge_texts["judge"].flops) == pytest.approx(0.047, rel=0.01)
    judge = costs.scores["judge"].flops
    assert tera(judge) == pytest.approx(0.335, rel=0.01)
    assert judge.tf32 > 0.99 * judge.all


def test_the_published_lora_has_as_many_numbers(make_config):
    trained = lambda path, rank: ModelBuilder.of(make_config(path, lora={"rank": rank})).policy().parameters
    assert sum(p.numel() for p in trained("somebody/sd", 4)) == pytest.approx(0.80e6, rel=0.01)
    assert sum(p.numel() for p in trained("somebody/sdxl", 64)) == pytest.approx(92.9e6, rel=0.01)
