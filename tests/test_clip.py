"""strop.engine.clip: the golden features and gradients, and a fresh one against transformers' CLIPModel bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from strop.engine.clip import TimeConditionedCLIP

FEATURES = 5e-6


@pytest.fixture(scope="module")
def case2(golden):
    return golden("case2_spm_clip")


@pytest.fixture(scope="module")
def trained(spm):
    """The golden preference model, whose modulation is far from the identity."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    return clip.eval()


@pytest.fixture
def plain(spm):
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    return clip.eval()


@pytest.fixture
def fresh(spm):
    """A time-conditioned CLIP on the same plain CLIP, as training begins with."""
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    clip = TimeConditionedCLIP(clip.eval())
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


def test_gradients_are_the_published_ones(trained, case2):
    trained.zero_grad()
    image = F.normalize(trained.image_features(case2["in/pixel_values"], case2["in/timesteps"]), dim=-1)
    text = F.normalize(trained.text_features(case2["in/input_ids"]), dim=-1)
    objective = (trained.logit_scale.exp() * (image * text).sum(-1)).sum()
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
