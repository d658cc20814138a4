"""judge/clip: the golden features and gradients, transformers' CLIPModel bit for bit, what is kept and when."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.pickscore import PICKSCORE

FEATURES = 5e-6


@pytest.fixture(scope="module")
def case2(golden):
    return golden("case2_spm_clip")


@pytest.fixture(scope="module")
def trained(spm):
    return trained_clip(spm)


def trained_clip(spm):
    """The golden preference model, whose modulation is far from the identity."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    return clip.eval()


@pytest.fixture
def plain(spm):
    return plain_clip(spm)


def plain_clip(spm):
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    return clip.eval()


@pytest.fixture
def fresh(spm):
    return fresh_clip(spm)


def fresh_clip(spm):
    """A time-conditioned CLIP on the same plain CLIP, as training begins with."""
    clip = TimeConditionedCLIP(plain_clip(spm))
    clip.reset_modulation(torch.Generator().manual_seed(0))
    return clip.eval()


def test_parameter_names_are_the_published_ones(trained, spm):
    assert trained.state_dict().keys() == spm.state.keys()


@pytest.mark.parametrize("size", ["48x48", "56x56", "64x64", "64x96", "64x97", "97x64", "112x112"])
@pytest.mark.parametrize("precision", ["spm", "spm_f64"])
@torch.no_grad()
def test_image_features_are_the_published_ones(trained, case2, precision, size):
    found = trained.image_features(case2[f"spm/{size}/pixel_values"], case2["in/timesteps"])
    expected = case2[f"{precision}/{size}/image_features"]
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=FEATURES)


@torch.no_grad()
def test_in_float64_the_features_agree_to_the_last_digits(trained, case2):
    """So that what is left in float32 is rounding alone."""
    wide = copy.deepcopy(trained).double()
    found = wide.text_features(case2["in/input_ids"])
    torch.testing.assert_close(found, case2["spm_f64/text_features"], rtol=0, atol=1e-13)
    for size in ("48x48", "64x97", "112x112"):
        found = wide.image_features(case2[f"spm/{size}/pixel_values"].double(), case2["in/timesteps"])
        torch.testing.assert_close(found, case2[f"spm_f64/{size}/image_features"], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "ids, recorded",
    [
        ("input_ids", "spm/text_features"),
        ("input_ids", "spm_f64/text_features"),
        ("input_ids_pad0", "spm/text_features_pad0"),
    ],
)
@torch.no_grad()
def test_text_features_are_the_published_ones(trained, case2, ids, recorded):
    found = trained.text_features(case2[f"in/{ids}"])
    torch.testing.assert_close(found.double(), case2[recorded].double(), rtol=0, atol=FEATURES)


@torch.no_grad()
def test_timestep_embedding_is_the_published_one(trained, case2):
    found = trained.t_embedder(case2["in/timesteps"])
    torch.testing.assert_close(found, case2["spm/t_embedder_out"], rtol=0, atol=FEATURES)


def test_timestep_sinusoids_have_the_cosines_first(trained, case2):
    seen = []
    with trained.t_embedder.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        trained.t_embedder(case2["in/timesteps"])
    torch.testing.assert_close(seen[0], case2["spm/t_embedder_freq"], rtol=0, atol=1e-6)
    assert torch.equal(seen[0][-1], torch.tensor([1.0] * 128 + [0.0] * 128))  # t = 0


def sum_of_scores(clip, case2):
    image = F.normalize(clip.image_features(case2["in/pixel_values"], case2["in/timesteps"]), dim=-1)
    text = F.normalize(clip.text_features(case2["in/input_ids"]), dim=-1)
    return (clip.logit_scale.exp() * (image * text).sum(-1)).sum()


def test_gradients_are_the_published_ones(trained, case2):
    trained.zero_grad()
    objective = sum_of_scores(trained, case2)
    objective.backward()
    torch.testing.assert_close(objective, case2["spm_grad/objective"], rtol=0, atol=2e-5)
    recorded = {k.removeprefix("spm_grad/model."): v for k, v in case2.items() if k.startswith("spm_grad/model.")}
    assert len(recorded) == 13
    for name, expected in recorded.items():
        error = (trained.get_parameter(name).grad - expected).norm() / expected.norm()
        assert error < 2e-5, name
    assert not [name for name, p in trained.named_parameters() if p.grad is None]


@pytest.mark.parametrize("t", [0, 1, 501, 999, [951, 501, 1, 0]], ids=str)
@torch.no_grad()
def test_a_fresh_one_is_the_clip_it_was_made_from_bit_for_bit(fresh, plain, case2, t):
    t = torch.tensor(t).reshape(-1)
    image = plain.get_image_features(pixel_values=case2["in/pixel_values"]).pooler_output
    text = plain.get_text_features(input_ids=case2["in/input_ids"]).pooler_output
    assert torch.equal(fresh.image_features(case2["in/pixel_values"], t), image)
    assert torch.equal(fresh.text_features(case2["in/input_ids"]), text)


@torch.no_grad()
def test_a_fresh_one_has_the_published_initialisation(fresh, golden, case2):
    """Also the features recorded from the published initialisation are met."""
    expected = {k.removeprefix("model."): v for k, v in golden("case2_spm_init_extra_state").items()}
    state = fresh.state_dict()
    for name, value in expected.items():
        if name.endswith("adaLN_modulation.1.bias") or (name.startswith("t_embedder") and name.endswith("bias")):
            assert torch.equal(state[name], value), name
        else:  # drawn: the same distribution, not the same numbers
            assert state[name].shape == value.shape
            assert state[name].std() == pytest.approx(0.02, rel=0.05)
    assert not any(value.any() for name, value in state.items() if name.endswith("adaLN_modulation.1.weight"))
    found = fresh.image_features(case2["in/pixel_values"], case2["in/timesteps"])
    torch.testing.assert_close(found, case2["spm_init/image_features"], rtol=0, atol=FEATURES)
    torch.testing.assert_close(found, case2["plain_clip/image_features"], rtol=0, atol=FEATURES)


@torch.no_grad()
def test_one_timestep_for_all_rows_is_that_timestep_for_each(trained, case2):
    pixels = case2["in/pixel_values"]
    one = trained.image_features(pixels, torch.tensor([501]))
    each = trained.image_features(pixels, torch.full((4,), 501))
    torch.testing.assert_close(one, each, rtol=0, atol=FEATURES)
    other = trained.image_features(pixels, torch.tensor([951]))
    assert (one - other).abs().max() > 0.01  # this modulation does listen to t


@torch.no_grad()
def test_rows_do_not_see_each_other(trained, case2):
    pixels, t = case2["in/pixel_values"], case2["in/timesteps"]
    together = trained.image_features(pixels, t)
    for i in range(4):
        alone = trained.image_features(pixels[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=FEATURES)


def test_reset_draws_from_its_generator_alone(fresh, spm):
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        fresh.reset_modulation(torch.Generator().manual_seed(seed))
        drawn.append(fresh.t_embedder.mlp[0].weight.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reset_undoes_any_training(trained, spm, plain, case2):
    other = TimeConditionedCLIP(CLIPModel(spm.config)).eval()
    other.load_state_dict(trained.state_dict())
    other.reset_modulation(torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = other.image_features(case2["in/pixel_values"], case2["in/timesteps"])
        assert torch.equal(found, plain.get_image_features(pixel_values=case2["in/pixel_values"]).pooler_output)


@torch.no_grad()
def test_without_modulation_it_is_a_plain_clip(spm, plain, case2):
    clip = TimeConditionedCLIP(CLIPModel(spm.config), modulated=False).eval()
    assert clip.state_dict().keys() == spm.plain.keys()
    clip.load_state_dict(spm.plain)
    expected = plain.get_image_features(pixel_values=case2["in/pixel_values"]).pooler_output
    for t in (0, 999, case2["in/timesteps"]):
        assert torch.equal(clip.image_features(case2["in/pixel_values"], t), expected)


@pytest.fixture
def counted(spm, case2):
    """A frozen preference model; features at t = 501; and the timesteps it has embedded so far."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config)).freeze()
    clip.load_state_dict(spm.state)
    embedded = []
    clip.t_embedder.register_forward_pre_hook(lambda module, args: embedded.extend(args[0].tolist()))
    return clip, lambda t=501: clip.image_features(case2["in/pixel_values"], t), embedded


def test_modulation_is_made_once_per_timestep_and_the_same_bit_for_bit(counted, case2):
    clip, features, embedded = counted
    for t in (501, 951, 501, 0, 951, 0, 0.5, 501.0):  # t of a flow is no whole number
        assert torch.equal(features(t), clip.image_features(case2["in/pixel_values"], torch.tensor([t])))
    # tensors of timesteps are embedded each time
    assert embedded == [501, 501, 951, 951, 501, 0, 0, 951, 0, 0.5, 0.5, 501]


def load_other_weights(clip, state):
    clip.load_state_dict({name: value + 0.01 for name, value in state.items()})


def assign_other_weights(clip, state):
    clip.load_state_dict({name: value + 0.01 for name, value in state.items()}, assign=True)


def load_as_a_part(clip, state):
    whole = torch.nn.ModuleDict({"judge": clip})
    whole.load_state_dict({f"judge.{name}": value + 0.01 for name, value in state.items()})


def reset(clip, state):
    clip.reset_modulation(torch.Generator().manual_seed(0))


def train_a_step(clip, state):
    clip.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=0.1)
    with torch.enable_grad():
        clip.image_features(torch.ones(1, 3, 56, 56), 501).sum().backward()
    optimizer.step()
    clip.eval().requires_grad_(False)


def write_behind_the_back_of_autograd(clip, state):
    """As DeepSpeed does, in a network that is put in and out of training."""
    clip.train()
    clip.vision_model.adaLN_modulation[1].bias.data.add_(0.5)
    clip.eval()


def write_unfrozen(clip, state):
    clip.unfreeze()
    clip.vision_model.adaLN_modulation[1].bias.data.add_(0.5)
    clip.freeze()


CHANGES = [
    load_other_weights,
    assign_other_weights,
    load_as_a_part,
    reset,
    train_a_step,
    write_behind_the_back_of_autograd,
    write_unfrozen,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_modulation_is_never_stale(counted, spm, case2, change):
    clip, features, _ = counted
    before = features()
    change(clip, spm.state)
    after = features()
    assert not torch.equal(after, before)
    assert torch.equal(after, clip.image_features(case2["in/pixel_values"], torch.tensor([501])))


def write_a_weight(clip):
    clip.vision_model.encoder.layers[1].adaLN_modulation[1].bias.add_(0.5)


def load_a_part(clip):
    clip.t_embedder.load_state_dict(clip.t_embedder.state_dict())


def replace_a_weight(clip):
    clip.t_embedder.mlp[0].bias = torch.nn.Parameter(clip.t_embedder.mlp[0].bias + 1, requires_grad=False)


@pytest.mark.parametrize("write", [write_a_weight, load_a_part, replace_a_weight], ids=lambda write: write.__name__)
@torch.no_grad()
def test_a_frozen_network_may_not_be_written_to(counted, write):
    clip, features, _ = counted
    features()
    write(clip)
    with pytest.raises(RuntimeError, match=r"call unfreeze\(\) before"):
        features()


@torch.no_grad()
def test_a_copy_keeps_what_is_its_own(counted, case2):
    clip, features, _ = counted
    before = features()
    other = copy.deepcopy(clip)
    write_a_weight(other)
    found = other.image_features(case2["in/pixel_values"], 501)
    assert not torch.equal(found, before)
    assert torch.equal(found, other.image_features(case2["in/pixel_values"], torch.tensor([501])))
    assert torch.equal(features(), before)


@torch.no_grad()
def test_modulation_follows_the_network_to_another_type(counted, case2):
    clip, features, embedded = counted
    features()
    clip.double()
    found = clip.image_features(case2["in/pixel_values"].double(), 501)
    assert found.dtype == torch.float64
    assert embedded == [501, 501]


@pytest.mark.parametrize("state", ["training", "with gradients", "a part with gradients", "autocast"])
def test_modulation_is_not_kept_of_a_network_that_changes(counted, state):
    clip, features, embedded = counted
    if state == "training":
        clip.train()
    if state == "with gradients":
        clip.requires_grad_()
    if state == "a part with gradients":
        clip.t_embedder.requires_grad_()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast"):
            features()
    assert embedded == [501, 501]


def test_names_and_shapes_at_full_size():
    """PickScore's own, and per vision layer, after the last and for the timestep what the published one has beyond."""
    with torch.device("meta"):
        plain = CLIPModel(CLIPConfig(**PICKSCORE))
        own = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
        clip = TimeConditionedCLIP(plain)
    found = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    layers = [f"vision_model.encoder.layers.{i}.adaLN_modulation.1" for i in range(32)]
    added = {
        f"{layer}.{kind}": shape for layer in layers for kind, shape in (("weight", (7680, 1280)), ("bias", (7680,)))
    }
    added |= {
        "vision_model.adaLN_modulation.1.weight": (2560, 1280),
        "vision_model.adaLN_modulation.1.bias": (2560,),
        "t_embedder.mlp.0.weight": (1280, 256),
        "t_embedder.mlp.0.bias": (1280,),
        "t_embedder.mlp.2.weight": (1280, 1280),
        "t_embedder.mlp.2.bias": (1280,),
    }
    assert found == own | added
    assert sum(math.prod(shape) for shape in own.values()) == 986_109_441
    assert sum(math.prod(shape) for shape in found.values()) == 986_109_441 + 320_066_560


@pytest.mark.parametrize("eos", [2, 49407])
@torch.no_grad()
def test_text_is_pooled_at_its_end_whichever_way_the_configuration_names_it(eos):
    """PickScore's configuration says eos_token_id 2, which stands for the highest token, and that is the real one."""
    tokens = {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    config = CLIPConfig(text_config=PICKSCORE["text_config"] | tokens).text_config
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 32, 64
    config.num_attention_heads = 2
    tower = CLIPTextModel(config).eval()
    ids = torch.tensor([[49406, 320, 1929, 49407, 49407, 49407], [49406, 320, 1929, 2368, 518, 49407]])
    found = tower(input_ids=ids)
    assert torch.equal(found.pooler_output, found.last_hidden_state[[0, 1], [3, 5]])
