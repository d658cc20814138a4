"""speed: no saving changes a number but for rounding, nor the name of a tensor, in the networks of either family."""

import functools
from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.training import ModelConfig
from strop.engine.models.base_model import configure_unet, load_unet
from strop.engine.models.guided_unet import Savings
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.speed.lora_linear import make_loras_lean
from strop.engine.speed.residual import make_residuals_lean
from strop.engine.speed.upsample import fold_upsamplers

CPU = torch.device("cpu")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BITS, ROUNDING = 0, 1e-5  # absolute, at outputs of about 1; of gradients, relative to the largest


def savings(**keys):
    return lambda policy, vae: setattr(policy, "savings", Savings(**keys))


def in_both(swap):
    """The swap finds something to do in UNet and VAE, and nothing more afterwards."""
    return lambda policy, vae: [swap(network) for network in (policy.unet, vae, policy.unet)]


def channels_last(policy, vae):
    for network in (policy.unet, vae):
        network.to(memory_format=torch.channels_last)


def checkpointing(policy, vae):
    configure_unet(policy.unet, ModelConfig(path="any", gradient_checkpointing=True))
    return [policy.unet.is_gradient_checkpointing, True, 0]


def checkpointed_halves(policy, vae):
    policy.savings = Savings(share_halves=True)
    policy.unet.enable_gradient_checkpointing()


SAVINGS = {  # what is done to policy and VAE, the tolerance
    "residual": (in_both(make_residuals_lean), BITS),
    "lora_linear": (lambda policy, vae: [make_loras_lean(policy.unet), 1, make_loras_lean(policy.unet)], ROUNDING),
    "upsample": (in_both(fold_upsamplers), ROUNDING),
    "channels_last": (channels_last, ROUNDING),
    "merged_lora": (savings(merge_lora=True), ROUNDING),
    "text_kv": (savings(), ROUNDING),
    "shared_halves": (savings(share_halves=True), ROUNDING),
    "gradient_checkpointing": (checkpointing, BITS),
    "checkpointed_halves": (checkpointed_halves, ROUNDING),
    "unet_rows": (savings(unet_rows=4), ROUNDING),
    "multiple": (savings(multiple=4), ROUNDING),
    "together": (savings(unet_rows=4, merge_lora=True, share_halves=True, multiple=4), ROUNDING),
}


@pytest.fixture(params=["sd15", "sdxl"], scope="module")
def loaded(request, tiny_folder, tiny_sdxl_folder):
    """loaded(targets) -> a policy away from its base, with the other networks of its family."""

    def load(targets):
        settings = ModelConfig(path=str(tiny_folder if request.param == "sd15" else tiny_sdxl_folder))
        policy, diffusion = Policy(load_unet(settings, CPU), 4, targets, seed=0), LatentDiffusion.load(settings, CPU)
        rng = torch.Generator().manual_seed(1)
        for p in policy.parameters:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=rng))
        return SimpleNamespace(policy=policy, diffusion=diffusion, cond=diffusion.encode(["a b", "c", "x y z"]))

    return load


@pytest.fixture(scope="module")
def expected(loaded):
    """expected(targets) -> the numbers without any saving, computed once."""
    return functools.cache(lambda targets: numbers(loaded(targets), text_kv=False))


def numbers(models, text_kv):
    """Outputs of every use of the networks by name, and the gradients of the LoRA relative to the largest."""
    policy, cond, actual = models.policy, models.cond, {}
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([801, 501, 1])
    for p in policy.parameters:
        p.grad = None
    actual["update"] = policy.eps(x, t, cond)
    with policy.reference():  # between forward and backward, as in training
        actual["reference"] = policy.eps(x, t, cond)
    actual["update"].square().mean().backward()
    gradients = [p.grad.clone() for p in policy.parameters]
    with policy.reference():
        with policy.sampling(cond, text_kv) as known:
            actual["sampled reference"] = policy.eps(x, t, known)
    with policy.sampling(cond, text_kv) as known:
        actual["sampled"], actual["unguided"] = (policy.eps(x, t, known, guided) for guided in (True, False))
        branches = policy.eps(x.repeat(2, 1, 1, 1), t.repeat(2), known[torch.tensor([1, 2, 0])].repeat(2))
        actual["branches of other prompts"] = branches
    largest = max(g.abs().max() for g in gradients)
    actual |= {f"gradient {i}": g / largest for i, g in enumerate(gradients)}
    return actual | {"images": models.diffusion.decode(x)}


@pytest.mark.parametrize("saving", SAVINGS)
def test_a_saving_changes_no_number_but_for_rounding(loaded, expected, saving):
    apply, atol = SAVINGS[saving]
    targets = ("to_q", "conv1") if saving == "residual" else ATTENTION  # conv1: a LoRA inside of the blocks
    models, expected = loaded(targets), expected(targets)
    networks = models.policy.unet, models.diffusion.vae
    names = [list(network.state_dict()) for network in networks]
    assert (expected["update"] - expected["reference"]).abs().max() > 1e-3  # the LoRA has an effect
    replaced = apply(models.policy, models.diffusion.vae)
    assert replaced is None or (all(replaced[:2]) and replaced[2] == 0)
    actual = numbers(models, text_kv=saving in ("text_kv", "together"))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert [list(network.state_dict()) for network in networks] == names
