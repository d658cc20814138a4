"""plan/memory and plan/fit: parts and phases by hand, what the keys do to them, which keys make a recipe fit."""

from collections import Counter
from types import SimpleNamespace

import pytest

from strop.engine.config.settings import varied
from strop.engine.errors import UserError
from strop.engine.plan.fit import find_fixes, options
from strop.engine.plan.memory import decoding_bytes, gradient_bytes, memory_use
from strop.engine.plan.meter import Flops, Measurement
from strop.engine.plan.out_of_memory import keys
from strop.engine.plan.row_counts import RowCounts

GB = 1e9
HALF, ONE, TWO = (Measurement(Flops(), size * GB) for size in (0.5, 1, 2))
NONE = Measurement(Flops(), 0.0)
WEIGHTS = {"UNet": 5, "VAE decoder": 1, "VAE encoder": 0.5, "tiny decoder": 0, "text encoders": 3}
WEIGHTS |= {"judge": 4, "judge's text encoder": 1, "LoRA": 1}
COSTS = SimpleNamespace(
    sampled=lambda: ONE,
    text_kv=lambda: NONE,
    merge=lambda: NONE,
    update=lambda checkpointing: TWO if checkpointing else TWO * 4,
    decode=lambda evaluation=False: TWO,
    image_bytes=lambda: 0.5 * GB,
    encode=lambda: HALF,
    scores={"judge": HALF * 0.5},
    judge_texts={"judge": ONE},
    text=ONE,
    weights={part: size * GB for part, size in WEIGHTS.items()},
)
AUDITED = SimpleNamespace(**vars(COSTS))
AUDITED.scores = COSTS.scores | {"auditor": HALF}
AUDITED.judge_texts = COSTS.judge_texts | {"auditor": ONE * 1.5}
AUDITED.weights = COSTS.weights | {"auditor": 2 * GB, "auditor's text encoder": 1 * GB}


@pytest.fixture
def config(make_config):
    return make_config(rollout={"prompts": 2}, optim={"micro_batch": 4}, evaluate={"batch": 2})


@pytest.fixture
def measure():
    """measure(config, ranks, counts) -> its memory, where not said of 8 images of 0.5 GB at once and of 32 pairs."""
    largest = Counter(guided=16, decode=8, judge=8)
    held = {"latents": 32 * 3, "other_bytes": 32 * (2 * 8 + 1), "exchanged": True}
    spo = RowCounts(2, largest=largest, trained_rows=32, **held)
    builder = lambda config: SimpleNamespace(config=config, latent_shape=(4, 8, 8), size=(64, 64))
    of = lambda config: AUDITED if config.auditor else COSTS
    return lambda config, ranks=1, counts=spo: memory_use(builder(config), counts, of(config), ranks)


def test_scorers_stay_on_the_gpu(config, measure):
    scored = varied(config, {"evaluate.scorers": ("clip_score", "hpsv2=HPS_v2_compressed.pt", "module:factory")})
    assert measure(scored).peak - measure(config).peak == pytest.approx(1.71 * GB + 3.94 * GB)


def test_so_does_a_scorer_that_rewards(make_config, measure):
    by_judge, by_scorer = (measure(make_config(method="ddpo", reward=reward)) for reward in ("judge", "aesthetic"))
    assert "scorers" not in by_judge.parts
    assert by_scorer.parts["scorers"] == 1.71 * GB


def test_what_a_method_without_a_rollout_has_in_memory(make_config, measure):
    """Encoders stay where pairs are not cached, and with them the images that a micro-batch encodes."""
    config = make_config(method="mapo")
    cached = measure(config, counts=RowCounts(6, "pair", trained_rows=6, x_t_per_row=2, kept=()))
    rows, kept = Counter({("encode", "encode"): 12}), ("text encoders", "VAE encoder")
    made = RowCounts(6, "pair", rows, Counter(encode=3), trained_rows=6, x_t_per_row=2, kept=kept)
    made = measure(config, counts=made)
    assert made.parts.items() - cached.parts.items() == {("text encoders", 3 * GB), ("VAE encoder", 0.5 * GB)}
    stays = sum(cached.parts.values())
    assert stays == (5 + 1 + 4 + 1 + 2) * GB
    assert cached.phases == {
        "embedding the prompts": stays - 2 * GB + 3 * GB + 0.5 * GB + 1 * GB + 1 * GB,
        "update": stays + 1 * GB + 6 * 2 * 8 * GB,
        "evaluation": stays + 32 * 2 * GB,
    }
    assert made.phases["encode"] == stays + 3.5 * GB + 1 * GB + 3 * 0.5 * GB
    assert made.phases["embedding the prompts"] == cached.phases["embedding the prompts"]


def test_parts_and_phases(config, measure):
    memory = measure(config)
    assert memory.parts["LoRA"] == 1 * GB
    assert memory.parts["optimizer state"] == 2 * GB
    stays = sum(memory.parts.values())
    assert stays == (5 + 1 + 0.5 + 4 + 1 + 2) * GB
    pairs = 32 * (3 * 4 * 4 * 64 + 2 * 8 + 1)  # numbers of three latents; step and prompt; shared
    assert memory.phases == {
        "embedding the prompts": stays - 2 * GB + 3 * GB + 1 * GB + 1 * GB,
        "rollout: UNet": stays + pairs + 16 * GB,
        "rollout: decode": stays + pairs + 16 * GB,
        "rollout: judge": stays + pairs + 4 * GB + 2 * GB,
        "update": stays + 1 * GB + 2 * pairs + 8 * 8 * GB,
        "evaluation": stays + 4 * GB,
    }
    assert (memory.peak_phase, memory.peak) == ("update", memory.phases["update"])


def test_an_auditor_stays_and_has_a_phase(make_config, measure):
    config = make_config(rollout={"prompts": 2}, audit={"path": "none", "every": 9})
    counts = RowCounts(2, largest=Counter(guided=16, decode=8, judge=8, auditor=4), trained_rows=32)
    plain, audited = (measure(each, counts=counts) for each in (make_config(rollout={"prompts": 2}), config))
    assert audited.parts.items() - plain.parts.items() == {("auditor", 2 * GB)}
    assert audited.phases["rollout: auditor"] == sum(audited.parts.values()) + 4 * GB + 4 * 0.5 * GB
    before, after = (memory.phases["embedding the prompts"] for memory in (plain, audited))
    assert after - before == 2 * GB + 1 * GB + (1.5 - 1) * GB  # weights, and a larger peak than of the other encoders


def test_a_rollout_that_decodes_nothing_has_no_phase_of_it(make_config, measure):
    counts = RowCounts(2, largest=Counter(guided=16, judge=8), trained_rows=32)
    phases = measure(make_config(rollout={"prompts": 2}), counts=counts).phases
    assert ("rollout: UNet" in phases, "rollout: decode" in phases) == (True, False)


@pytest.mark.parametrize(
    "key, value, phase, less",
    [
        ("model.unet_rows", 4, "rollout: UNet", 12),
        ("model.decode_rows", 2, "rollout: decode", 16 - 2 * 8 * 0.5),  # its parts, and the whole they are joined to
        ("model.gradient_checkpointing", True, "update", 8 * 6),
        ("optim.micro_batch", 1, "update", 8 * 6),
    ],
)
@pytest.mark.parametrize("decoder", [None, "somebody/taesd"])
def test_each_key_makes_its_phase_smaller(config, measure, key, value, phase, less, decoder):
    before, after = measure(config), measure(varied(config, {key: value, "rollout.decoder": decoder}))
    assert before.phases[phase] - after.phases[phase] == pytest.approx(less * GB)


def test_zero_shards_the_optimizer_and_then_the_gradients(config, measure):
    alone, four = measure(config), measure(config, ranks=4)
    assert four.parts["optimizer state"] == (2 / 4 + 1 / 4) * GB
    assert "balance of pairs" in four.phases.keys() - alone.phases.keys()
    assert gradient_bytes(1, 1 * GB, 1, 2) == 1 * GB
    assert gradient_bytes(1, 1 * GB, 4, 1) - gradient_bytes(2, 1 * GB, 4, 1) == 0.75 * GB
    assert gradient_bytes(2, 1 * GB, 4, 2) - gradient_bytes(2, 1 * GB, 4, 1) == 1 * GB, "the sums of micro-batches"


@pytest.mark.parametrize(
    "latents, at_once, expected", [(8, None, 80), (8, 8, 80), (8, 2, 2 * 8 * 3), (8, 5, 50 + 3 * 3), (3, 50, 30)]
)
def test_decoding_in_parts_keeps_what_came_out(latents, at_once, expected):
    assert decoding_bytes(10, 3, latents, at_once) == expected


CHECKPOINTING = {"model.gradient_checkpointing": True}
SMALL_UPDATE = CHECKPOINTING | {"optim.micro_batch": 1}


@pytest.mark.parametrize(
    "keys, available, expected",
    [
        ({}, 1000, {}),
        ({}, 30, CHECKPOINTING | {"optim.micro_batch": 2, "optim.accumulate": 2}),
        (SMALL_UPDATE, 26, {"model.unet_rows": 8, "model.decode_rows": 4}),  # the mildest that are enough
    ],
    ids=["it fits", "the update is too large", "the rollout is too large"],
)
def test_fixes_make_it_fit(config, measure, keys, available, expected):
    config = varied(config, keys)
    fixes, memory = find_fixes(config, measure, available * GB)
    settings = {key: value for fix in fixes for key, value in fix.settings.items()}
    assert settings == expected
    assert memory == measure(varied(config, settings))
    assert memory.peak <= available * GB
    assert all(fix.before > fix.after for fix in fixes)


def test_fixes_may_not_be_enough(config, measure):
    fixes, memory = find_fixes(config, measure, 5 * GB)
    assert memory.peak > 5 * GB
    assert memory.peak_phase == "rollout: decode"
    assert {"model.decode_rows": 2} in [fix.settings for fix in fixes]  # with fewer, the images are what is left


SMALLER_UPDATES = {  # sections of a recipe, and the settings for a smaller update that its method accepts
    "spo": ({"optim": {"micro_batch": 2}}, [{"optim.micro_batch": 1, "optim.accumulate": 2}]),
    "ddpo": ({"optim": {"micro_batch": 10}}, [{"optim.micro_batch": size} for size in (5, 2, 1)]),
    "d3po": (  # three draws of each pair stay together
        {"optim": {"discount": 0.9, "draws": 3, "pairs": 2, "micro_batch": 6}},
        [{"optim.micro_batch": 3}],
    ),
    "mapo": ({"optim": {"micro_batch": 2}}, [{"optim.micro_batch": 1, "optim.accumulate": 4}]),
}


@pytest.mark.parametrize("method", SMALLER_UPDATES)
def test_only_what_the_method_accepts_is_proposed(make_config, method):
    sections, expected = SMALLER_UPDATES[method]
    config = make_config(method=method, model={"gradient_checkpointing": True}, zero={"stage": 2}, **sections)
    assert list(options("update", config)) == expected


@pytest.mark.parametrize(
    "method, sections, expected",
    [
        ("spo", {"rollout": {"prompts": 5}}, "rollout.prompts=2"),
        ("ddpo", {"rollout": {"prompts": 9}, "optim": {"updates": 3}}, "rollout.prompts=3"),
        ("spo", {"rollout": {"prompts": 1}}, "model.dtype=float16"),
        ("mapo", {}, "model.dtype=float16"),
    ],
)
def test_what_takes_less_where_no_phase_is_to_blame(make_config, method, sections, expected):
    assert keys(make_config(method=method, **sections), "load") == [expected]


def test_a_fix_that_the_method_refuses_is_passed_over(config, measure):
    def refusing(changed):
        if changed.optim.micro_batch == 2:
            raise UserError("no optimizer step")
        return measure(changed)

    fixes, _ = find_fixes(config, refusing, 30 * GB)
    assert fixes[-1].settings["optim.micro_batch"] == 1
