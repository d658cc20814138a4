"""models/policy: the recorded UNet, a reference that is the base model bit for bit, and LoRA files for others."""

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer

from strop.engine.config.training import ModelConfig
from strop.engine.errors import UserError
from strop.engine.models.base_model import load_unet
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.guided_unet import Savings, unet_eps
from strop.engine.models.lora_file import write
from strop.engine.models.policy import Policy

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def base(tiny_folder):
    """The UNet that never had an adapter."""
    return UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()


@pytest.fixture
def inputs(golden):
    """Latents, timesteps and prompts of three rows."""
    case6 = golden("case6_sd15_k4_b3")
    cond = Conditioning(case6["in/prompt_embeds"], case6["in/negative_prompt_embeds"][:1])
    return case6["rand/000_randn"], torch.tensor([951, 451, 1]), cond


@pytest.fixture
def fresh(tiny_folder):
    """fresh(seed=7) -> a new policy on the golden UNet."""

    def make(rank=4, targets=TARGETS, seed=0, **model):
        return Policy(load_unet(ModelConfig(path=str(tiny_folder), **model), CPU), rank, targets, seed)

    return make


def trained(policy):
    """Gives the LoRA weights with an effect, as training would."""
    rng = torch.Generator().manual_seed(0)
    for p in policy.parameters:
        p.data = 0.2 * torch.randn(p.shape, generator=rng)
    return policy


@torch.no_grad()
def test_the_recorded_unet_outputs(policy, inputs, golden):
    """The guidance halves are ordered as published, without the prompt first, in trunk and branches."""
    case6, cond = golden("case6_sd15_k4_b3"), inputs[2]
    for i, t in enumerate(case6["schedule/timesteps"]):
        x = case6[f"f32/unet/{i:02}/latent_model_input_first_half"]
        actual = policy.eps(x, t.repeat(len(x)), cond.repeat(len(x) // 3))
        expected = case6[f"f32/unet/{i:02}/noise_pred_uncond_text"].unflatten(0, (2, len(x)))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_recorded_unet_outputs_of_sdxl(tiny_sdxl_folder, golden):
    """As above, with the pooled text and the sizes that go with it."""
    case6 = golden("case6_sdxl_k2_b2_inner3")
    cond = Conditioning(
        case6["in/prompt_embeds"],
        case6["in/negative_prompt_embeds"][:1],
        pooled=case6["in/pooled_prompt_embeds"],
        null_pooled=case6["in/negative_pooled_prompt_embeds"][:1],
        time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
    )
    unet = load_unet(ModelConfig(path=str(tiny_sdxl_folder)), CPU)
    for i, t in enumerate(case6["schedule/timesteps"]):
        x = case6[f"f32/unet/{i:02}/latent_model_input_first_half"]
        actual = unet_eps(unet, x, t.repeat(len(x)), cond.repeat(len(x) // 2), guided=True)
        expected = case6[f"f32/unet/{i:02}/noise_pred_uncond_text"].unflatten(0, (2, len(x)))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        for half, which in enumerate((cond.repeat(len(x) // 2).unprompted(), cond.repeat(len(x) // 2))):
            alone = unet_eps(unet, x, t.repeat(len(x)), which, guided=False)
            torch.testing.assert_close(alone[0], expected[half], rtol=0, atol=1e-5)


@torch.no_grad()
def test_eps_is_each_half_by_itself(policy, inputs):
    x, t, cond = inputs
    trained(policy)
    actual = policy.eps(x, t, cond)
    assert actual.shape == (2, 3, 4, 8, 8)
    torch.testing.assert_close(policy.eps(x, t, cond, guided=False), actual[1:], rtol=0, atol=1e-5)
    for i in range(3):
        for half, text in enumerate((cond.null, cond.text[i : i + 1])):
            expected = policy.unet(x[i : i + 1], t[i], encoder_hidden_states=text).sample[0]
            torch.testing.assert_close(actual[half, i], expected, rtol=0, atol=1e-5)


def test_the_reference_is_the_base_model_bit_for_bit(policy, base, inputs):
    trained(policy)
    before = policy.eps(*inputs)
    with policy.reference():
        reference = policy.eps(*inputs)
    with pytest.raises(RuntimeError, match="in between"), policy.reference():
        raise RuntimeError("in between")
    after = policy.eps(*inputs)
    assert torch.equal(reference, unet_eps(base, *inputs, guided=True))
    assert not reference.requires_grad
    assert torch.equal(before, after)
    assert (after - reference).abs().max() > 1e-3  # the LoRA does have an effect
    assert after.requires_grad


def test_a_lora_that_cannot_be_switched_off_is_refused(base, monkeypatch):
    """As with a PEFT whose layers have another switch, where the reference would silently be the policy."""
    monkeypatch.setattr(BaseTunerLayer, "disable_adapters", property(lambda layer: False))
    with pytest.raises(UserError, match="peft: this version"):
        Policy(base, rank=4, target_modules=TARGETS, seed=0)


@pytest.mark.parametrize("rows, forwards", [(None, [6]), (4, [4, 2]), (2, [2, 2, 2])], ids=str)
def test_the_rows_of_a_forward_are_bounded_while_sampling(policy, inputs, rows, forwards):
    """Guidance halves stay in one forward; the update is not concerned."""
    trained(policy).savings = Savings(unet_rows=rows)
    x, t, cond = inputs
    expected, seen = policy.eps(x, t, cond), []
    policy.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with policy.sampling(cond, text_kv=False) as known:
        actual = policy.eps(x, t, known)
    assert seen == forwards
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    policy.eps(x, t, cond)
    assert seen[len(forwards) :] == [6]


def test_the_lora_is_part_of_the_weights_while_sampling(policy, inputs):
    """No adapter runs, neither in a forward nor in the keys and values that are kept."""
    trained(policy).savings = Savings(merge_lora=True)
    (x, t, cond), adapters = inputs, []
    lora = next(module for name, module in policy.unet.named_modules() if name.endswith("lora_A.default"))
    lora.register_forward_hook(lambda *_: adapters.append(1))
    for text_kv in (False, True):
        with policy.sampling(cond, text_kv) as known:
            policy.eps(x, t, known)
    assert not adapters
    policy.eps(x, t, cond)
    assert adapters


@pytest.mark.parametrize(
    "dtype, key, merges",
    [("float32", None, True), ("float16", None, False), ("float16", True, True), ("float32", False, False)],
    ids=str,
)
def test_by_default_the_lora_is_merged_where_that_changes_nothing(dtype, key, merges):
    assert ModelConfig(path="any", dtype=dtype, merge_lora=key).merges_lora is merges


def test_a_reference_pass_leaves_the_gradients_as_they_are(policy, inputs):
    """Between the policy's forward and its backward, and between two backwards."""
    trained(policy)

    def gradients(interrupted):
        for p in policy.parameters:
            p.grad = None
        for _ in range(2):
            eps = policy.eps(*inputs)
            if interrupted:
                with policy.reference():
                    policy.eps(*inputs)
            eps.square().mean().backward()
        return [p.grad.clone() for p in policy.parameters]

    for plain, interrupted in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, interrupted)


@pytest.mark.parametrize(
    "targets, layers",
    [(TARGETS, 32), (("to_k", "to_out.0"), 16)],
    ids=["attention", "keys-and-outputs"],
)
def test_only_the_lora_trains(fresh, inputs, targets, layers):
    policy = fresh(rank=2, targets=targets)
    assert policy.latent_shape == (4, 8, 8)
    assert not policy.unet.training
    named = {name: p for name, p in policy.unet.named_parameters() if p.requires_grad}
    assert len(named) == 2 * layers
    assert all("lora_" in name and name.split(".lora_")[0].endswith(targets) for name in named)
    assert {id(p) for p in policy.parameters} == {id(p) for p in named.values()}
    policy.eps(*inputs).square().mean().backward()
    assert not [name for name, p in policy.unet.named_parameters() if p.grad is not None and name not in named]


def test_the_lora_starts_as_published(fresh):
    """A ~ N(0, 1 / r^2), B = 0, and a scale of 1."""
    policy = fresh(rank=8)
    state = policy.lora_state()
    first = torch.cat([value.flatten() for name, value in state.items() if "lora_A" in name])
    assert first.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert first.mean().item() == pytest.approx(0, abs=0.005)
    assert not any(value.any() for name, value in state.items() if "lora_B" in name)
    assert policy.unet.peft_config["default"].lora_alpha == 8


def test_the_seed_alone_decides_the_start(fresh):
    def start(seed, noise):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        state = fresh(seed=seed).lora_state()
        assert torch.equal(torch.random.get_rng_state(), before)
        return state

    first, again, other = start(7, noise=1), start(7, noise=2), start(8, noise=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_a_narrow_base_keeps_its_lora_wide(policy, fresh, inputs):
    wide, policy = policy.eps(*inputs), fresh(dtype="bfloat16")
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    assert {p.dtype for p in policy.unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    x, t, cond = inputs
    actual = policy.eps(x, t, Conditioning(cond.text.bfloat16(), cond.null.bfloat16()))
    assert actual.dtype == torch.float32
    assert ((actual - wide).norm() / wide.norm()).item() < 0.05


@pytest.mark.parametrize("form", ["own", "kohya"])
@torch.no_grad()
def test_a_saved_lora_is_loaded_again(policy, inputs, fresh, tmp_path, form):
    expected = trained(policy).eps(*inputs)
    policy.save_lora(tmp_path / "lora")
    file = tmp_path / "lora" if form == "own" else write(policy.lora(), tmp_path / "kohya.safetensors", "kohya")
    again = fresh(seed=9)
    again.load_lora(file)
    assert torch.equal(again.eps(*inputs), expected)
    assert all(torch.equal(value, policy.lora_state()[name]) for name, value in again.lora_state().items())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rank": 2}, ("rank 2", "rank 4 (lora.rank)", "down_blocks.0", "lora.rank=2")),
        ({"rank": 2, "form": "kohya"}, ("lora.rank=2",)),
        ({"targets": ("to_q",)}, ("8 layers", "32", "lora.target_modules")),
        ({"alpha": 2.0}, ("alpha 2", "rank 4")),
        ({"width": 48}, ("(4, 48)", "(4, 32)")),
    ],
    ids=str,
)
def test_a_lora_file_that_does_not_fit_is_refused_by_name(policy, base, tmp_path, changes, words):
    before = {name: value.clone() for name, value in policy.lora_state().items()}
    unet = UNet2DConditionModel.from_config(base.config, cross_attention_dim=changes.get("width", 32))
    lora = Policy(unet, changes.get("rank", 4), changes.get("targets", TARGETS), seed=1).lora({"strop.family": "sd15"})
    lora = dataclasses.replace(lora, alpha=dict.fromkeys(lora.alpha, changes.get("alpha", changes.get("rank", 4))))
    file = write(lora, tmp_path / "other.safetensors", changes.get("form", "diffusers"))
    with pytest.raises(UserError, match=f"^{file} ") as refused:
        policy.load_lora(file)
    assert [word for word in words if word not in str(refused.value)] == []
    assert all(torch.equal(value, before[name]) for name, value in policy.lora_state().items())


def test_a_folder_without_a_lora_file_is_refused(policy, tmp_path):
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors"):
        policy.load_lora(tmp_path)
