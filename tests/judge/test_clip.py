"""judge/clip: the golden features and gradients, transformers' CLIPModel bit for bit, what is kept and when."""

import copy

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


def plain_clip(spm):
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    return clip.eval()


def fresh_clip(spm):
    """A time-conditioned CLIP on the same plain CLIP, as training begins with."""
    clip = TimeConditionedCLIP(plain_clip(spm))
    clip.reset_modulation(torch.Generator().manual_seed(0))
    return clip.eval()


@pytest.fixture(scope="module")
def wide(trained):
    return copy.deepcopy(trained).double()


@pytest.mark.parametrize("size", ["48x48", "56x56", "64x64", "64x96", "64x97", "97x64", "112x112"])
@torch.no_grad()
def test_image_features_are_the_published_ones(trained, wide, case2, size):
    """In float64 to the last digits, so that what is left in float32 is rounding alone."""
    pixels, t = case2[f"spm/{size}/pixel_values"], case2["in/timesteps"]
    close(trained.image_features(pixels, t), case2[f"spm/{size}/image_features"])
    close(wide.image_features(pixels.double(), t), case2[f"spm_f64/{size}/image_features"], 1e-13)


@torch.no_grad()
def test_text_features_and_timestep_embeddings_are_the_published_ones(trained, wide, case2):
    close(trained.text_features(case2["in/input_ids"]), case2["spm/text_features"])
    close(trained.text_features(case2["in/input_ids_pad0"]), case2["spm/text_features_pad0"])
    close(wide.text_features(case2["in/input_ids"]), case2["spm_f64/text_features"], 1e-13)
    close(trained.t_embedder(case2["in/timesteps"]), case2["spm/t_embedder_out"])


def close(actual, expected, atol=FEATURES):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


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


@pytest.mark.parametrize("t", [0, 999, [951, 501, 1, 0]], ids=str)
@torch.no_grad()
def test_a_fresh_one_is_the_clip_it_was_made_from_bit_for_bit(spm, case2, t):
    fresh, plain, t = fresh_clip(spm), plain_clip(spm), torch.tensor(t).reshape(-1)
    image = plain.get_image_features(pixel_values=case2["in/pixel_values"]).pooler_output
    text = plain.get_text_features(input_ids=case2["in/input_ids"]).pooler_output
    assert torch.equal(fresh.image_features(case2["in/pixel_values"], t), image)
    assert torch.equal(fresh.text_features(case2["in/input_ids"]), text)


@torch.no_grad()
def test_a_fresh_one_has_the_published_initialisation(spm, golden, case2):
    """Also the features recorded from the published initialisation are met."""
    expected = {k.removeprefix("model."): v for k, v in golden("case2_spm_init_extra_state").items()}
    fresh = fresh_clip(spm)
    state = fresh.state_dict()
    for name, value in expected.items():
        if name.endswith("adaLN_modulation.1.bias") or (name.startswith("t_embedder") and name.endswith("bias")):
            assert torch.equal(state[name], value), name
        else:  # drawn: the same distribution, not the same numbers
            assert state[name].shape == value.shape
            assert state[name].std() == pytest.approx(0.02, rel=0.05)
    assert not any(value.any() for name, value in state.items() if name.endswith("adaLN_modulation.1.weight"))
    actual = fresh.image_features(case2["in/pixel_values"], case2["in/timesteps"])
    close(actual, case2["spm_init/image_features"])
    close(actual, case2["plain_clip/image_features"])


def test_reset_draws_from_its_generator_alone(spm):
    fresh, drawn, before = fresh_clip(spm), [], torch.random.get_rng_state()
    for seed in (0, 0, 1):
        fresh.reset_modulation(torch.Generator().manual_seed(seed))
        drawn.append(fresh.t_embedder.mlp[0].weight.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def counted(spm, case2):
    """A frozen preference model; features at t = 501; and the timesteps it has embedded so far."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config)).freeze()
    clip.load_state_dict(spm.state)
    embedded = []
    clip.t_embedder.register_forward_pre_hook(lambda module, args: embedded.extend(args[0].tolist()))
    return clip, lambda t=501: clip.image_features(case2["in/pixel_values"], t), embedded


def train_a_step(clip, other):
    clip.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=0.1)
    with torch.enable_grad():
        clip.image_features(torch.ones(1, 3, 56, 56), 501).sum().backward()
    optimizer.step()
    clip.eval().requires_grad_(False)


def in_training_mode(clip, other):
    """As DeepSpeed does, in a network that is put in and out of training."""
    clip.train()
    clip.vision_model.adaLN_modulation[1].bias.data.add_(0.5)
    clip.eval()


def unfrozen(clip, other):
    clip.unfreeze()
    clip.vision_model.adaLN_modulation[1].bias.data.add_(0.5)
    clip.freeze()


CHANGES = {
    "load": lambda clip, other: clip.load_state_dict(other),
    "assign": lambda clip, other: clip.load_state_dict(other, assign=True),
    "load as a part": lambda clip, other: torch.nn.ModuleList([clip]).load_state_dict(
        {f"0.{name}": value for name, value in other.items()}
    ),
    "reset": lambda clip, other: clip.reset_modulation(torch.Generator().manual_seed(0)),
    "another type": lambda clip, other: clip.double(),
    "train a step": train_a_step,
    "write in training mode": in_training_mode,
    "write unfrozen": unfrozen,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_modulation_is_never_stale(counted, spm, case2, change):
    clip, features, _ = counted
    before = features()
    CHANGES[change](clip, {name: value + 0.01 for name, value in spm.state.items()})
    after = features()
    assert (after - before).any()
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
    with pytest.raises(RuntimeError, match=r"unfreeze\(\)"):
        features()


@torch.no_grad()
def test_a_copy_keeps_what_is_its_own(counted, case2):
    clip, features, _ = counted
    before, other = features(), copy.deepcopy(clip)
    write_a_weight(other)
    actual = other.image_features(case2["in/pixel_values"], 501)
    assert not torch.equal(actual, before)
    assert torch.equal(actual, other.image_features(case2["in/pixel_values"], torch.tensor([501])))
    assert torch.equal(features(), before)


CHANGING = {
    "training": lambda clip: clip.train(),
    "with gradients": lambda clip: clip.requires_grad_(),
    "a part with gradients": lambda clip: clip.t_embedder.requires_grad_(),
    "autocast": lambda clip: None,
}


@pytest.mark.parametrize("state", CHANGING)
def test_modulation_is_not_kept_of_a_network_that_changes(counted, state):
    clip, features, embedded = counted
    CHANGING[state](clip)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast"):
            features()
    assert embedded == [501, 501]


def test_parameters_at_full_size():
    """PickScore's own, and what the published one has beyond."""
    with torch.device("meta"):
        plain = CLIPModel(CLIPConfig(**PICKSCORE))
        pickscore = sum(p.numel() for p in plain.parameters())
        clip = TimeConditionedCLIP(plain)
    assert pickscore == 986_109_441
    assert sum(p.numel() for p in clip.parameters()) == pickscore + 320_066_560
    assert clip.vision_model.encoder.layers[31].adaLN_modulation[1].weight.shape == (7680, 1280)


@pytest.mark.parametrize("eos", [2, 49407])
@torch.no_grad()
def test_text_is_pooled_at_its_end_whichever_way_the_configuration_names_it(eos):
    """PickScore's configuration says eos_token_id 2, which stands for the highest token, and that is the real one."""
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    tower = CLIPTextModel(CLIPConfig(text_config=PICKSCORE["text_config"] | small | tokens).text_config).eval()
    ids = torch.tensor([[49406, 320, 1929, 49407, 49407, 49407], [49406, 320, 1929, 2368, 518, 49407]])
    actual = tower(input_ids=ids)
    assert torch.equal(actual.pooler_output, actual.last_hidden_state[[0, 1], [3, 5]])
