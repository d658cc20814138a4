"""strop.engine.judge.latent and latent_files: LPO's released judges score as their code does, and what is refused."""

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.errors import UserError
from strop.engine.judge import latent_files
from strop.engine.judge.candidates import Candidates
from strop.engine.judge.find import load_judge
from strop.engine.judge.latent import DECODER, LatentJudge, LatentNetwork
from strop.engine.judge.loss import example_weights, preference_loss, preference_scores
from strop.engine.models.families.find import family_named
from strop.engine.models.latent_diffusion import LatentDiffusion, TextEncoding
from strop.engine.models.policy import Policy
from strop.engine.runtime.ranks import Ranks
from strop.engine.speed.merged_lora import merged_lora

GOLDEN = Path(__file__).parents[1] / "golden" / "methods" / "case7_lpo_reward_model.safetensors"
CPU = torch.device("cpu")
FAMILIES = ("sd15", "sdxl")
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class Prompts:
    """A tokenizer of the prompts "0" to "3", whose tokens are the golden ones, and of the empty one."""

    model_max_length = 12

    def __init__(self, ids, fill):
        self.rows = {str(i): row for i, row in enumerate(ids)}
        self.rows[""] = torch.tensor([38, 39] + [fill] * 10)

    def __call__(self, prompts, **options):
        return SimpleNamespace(input_ids=torch.stack([self.rows[prompt] for prompt in prompts]))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, golden, tmp_path_factory):
    """A tiny judge in LPO's layout, the base model's parts that it needs, and what the authors' code made of it."""
    name = request.param
    tensors = {k.removeprefix(f"{name}/"): v for k, v in golden("methods/case7_lpo_reward_model").items() if name in k}
    with safe_open(str(GOLDEN), "pt") as file:
        config = json.loads(file.metadata()["config"])[name]["config"]
    folder = tmp_path_factory.mktemp(name)
    state = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config["unet"])
    assert not unet.load_state_dict(state("model/unet."), strict=False).unexpected_keys
    unet.save_pretrained(folder / "unet")
    ids = {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 38, "eos_token_id": 2, "pad_token_id": 39}
    for part, key in zip(family_named(name).text_encoders, ("text", "text2"), strict=False):
        encoder = ENCODERS[part](CLIPTextConfig(**ids | config[key]))
        weights = state(f"model/{part}.")
        if not any(k.startswith("text_model.") for k in encoder.state_dict()):
            weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
        encoder.load_state_dict(weights)
        encoder.save_pretrained(folder / part)
    released = {"visual_projection": {"weight": tensors["model/visual_projection.weight"]}}
    released["logit_scale"] = tensors["model/logit_scale"]
    if name == "sd15":
        released["text_projection"] = {"weight": tensors["model/text_projection.weight"]}
    torch.save(released, folder / "state_dict.pt")
    tokenizers = [Prompts(tensors["in/input_ids"], 39)]
    tokenizers += [Prompts(tensors["in/input_ids_2"], 0)] if name == "sdxl" else []
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, **BLOCKS)
    diffusion = LatentDiffusion(family_named(name), TextEncoding(), vae, DDIMScheduler(), latent_shape=(4, 16, 16))
    diffusion.tokenizers = tokenizers
    return SimpleNamespace(folder=folder, diffusion=diffusion, tensors=tensors)


def load(case, **keys):
    config = JudgeConfig(path=str(case.folder), kind="latent", **keys)
    return latent_files.load(config, case.diffusion, None, torch.float32)


def published(name):
    """The name of a parameter in LPO's code."""
    name = name.replace("encoders.0.", "text_encoder.").replace("encoders.1.", "text_encoder_2.")
    return f"{name}.weight" if name in ("visual_projection", "text_projection") else name


def scored(judge, latents, t, drawn_at):
    """Scores of latents (K, 4, C, h, w) of the four prompts."""
    candidates = Candidates(latents, t, drawn_at, never, never)
    return judge.score(candidates, SimpleNamespace(judge=judge.encode(list("0123"))))


def never(*_):
    raise AssertionError("neither a look ahead nor an image is needed")


@pytest.mark.parametrize("variant, keys", [("published", {}), ("no_guidance", {"guidance": 1.0})], ids=str)
def test_scores_are_those_of_the_released_code(case, variant, keys):
    judge, tensors = load(case, **keys), case.tensors
    latents = tensors["in/noisy_latents"].unsqueeze(0)
    for t in (951, 1):
        found = scored(judge, latents, 0, t)[0]
        torch.testing.assert_close(found.double(), tensors[f"{variant}/f64/scores_all_t{t}"], rtol=0, atol=3e-4)
    with torch.no_grad():
        features = judge._unpacked(judge.encode(list("0123"))).judge
    torch.testing.assert_close(features.double(), tensors[f"{variant}/f64/text_features"], rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("variant, keys", [("published", {}), ("no_guidance", {"guidance": 1.0})], ids=str)
def test_the_loss_and_its_gradients_are_those_of_the_released_training(case, variant, keys):
    judge, tensors = load(case, **keys), case.tensors
    judge.unfreeze()
    latents = tensors["in/pair_latents"].unflatten(0, (2, 4))
    scores = preference_scores(judge, latents, judge.encode(list("0123")), tensors["in/timesteps"])
    labels = torch.stack([tensors["in/label_0"], tensors["in/label_1"]]).float()
    weights = example_weights(tensors["in/num_examples_per_prompt"], Ranks(0, 1, CPU))
    loss, _ = preference_loss(scores, labels, weights)
    loss.backward()
    assert loss.item() == pytest.approx(tensors[f"{variant}/f64/loss"].item(), abs=4e-5)
    found = {published(name): value.grad for name, value in judge.network.named_parameters() if value.requires_grad}
    assert [name for name, grad in found.items() if grad is None] == []
    prefix = f"{variant}/f64/grad/"
    expected = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert len(expected) >= 5
    for name, value in expected.items():
        assert (found[name].double() - value).norm() < 2e-4 * value.norm(), name
    norm = torch.stack([grad.double().norm() for grad in found.values()]).norm()
    assert norm.item() == pytest.approx(tensors[f"{variant}/f64/grad_norm_all"].item(), rel=2e-4)


def test_the_middle_alone_may_be_projected(case):
    judge = load(case)
    judge.network.visual_projection = torch.nn.Parameter(case.tensors["mid_only/visual_projection.weight"])
    found = scored(judge, case.tensors["in/noisy_latents"].unsqueeze(0), 0, 951)[0]
    torch.testing.assert_close(found.double(), case.tensors["mid_only/f64/scores_all_t951"], rtol=0, atol=3e-4)


def test_a_saved_judge_scores_as_before(case, tmp_path):
    """Without the UNet's decoder, by the conventions that it was saved with."""
    judge = load(case, guidance=1.0)
    judge.t_of_step = False
    latent_files.save(tmp_path, judge)
    names = {name.split(".")[0] for name in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")}
    assert not names & set(DECODER)
    again = load(SimpleNamespace(folder=tmp_path, diffusion=case.diffusion))
    latents = torch.randn(3, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = scored(judge, latents, 501, 951)
    assert torch.equal(scored(again, latents, 501, 1), expected)
    assert not torch.equal(scored(again, latents, 1, 501), expected)
    assert expected.shape == (3, 4)


def test_clean_images_are_scored_by_their_latents_at_the_least_timestep(case):
    judge = load(case)
    images = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = judge.encode(list("0123"))
    with torch.no_grad():
        mean = case.diffusion.vae.encode(images[0]).latent_dist.mean
    expected = scored(judge, 0.18215 * mean.unsqueeze(0), 1, 1)
    torch.testing.assert_close(judge.score_images(images, text, t=0), expected)


@pytest.mark.parametrize(
    "dtype, model, expected", [("float16", "float32", torch.float16), (None, "bfloat16", torch.bfloat16)]
)
def test_its_networks_are_of_its_own_type_or_the_models(case, dtype, model, expected):
    """Projections and scores are in float32, and the scores near those in float32."""
    recipe = JudgeConfig(path=str(case.folder), kind="latent", dtype=dtype)
    judge = load_judge(recipe, ModelConfig(path="none", dtype=model), case.diffusion, None)
    network = judge.network
    assert {p.dtype for part in (network.unet, *network.encoders) for p in part.parameters()} == {expected}
    assert network.visual_projection.dtype == network.logit_scale.dtype == torch.float32
    latents = case.tensors["in/noisy_latents"].unsqueeze(0)
    scores, exact = (scored(each, latents, 0, 951) for each in (judge, load(case)))
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < 0.2 * exact.abs().max()


def test_a_judge_without_text_encoders_says_so(case):
    judge = load(case)
    judge.release_text_tower()
    with pytest.raises(RuntimeError, match="text features"):
        judge.encode(["0"])


def broken(folder, target):
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def without_scale(folder):
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    del state["logit_scale"]
    torch.save(state, folder / "state_dict.pt")


def too_wide(folder):
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    state["visual_projection"]["weight"] = torch.zeros(12, 65)
    torch.save(state, folder / "state_dict.pt")


def not_finite(folder):
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    state["logit_scale"] = torch.tensor(float("nan"))
    torch.save(state, folder / "state_dict.pt")


FAULTS = {
    "no projections": (
        lambda f: (f / "state_dict.pt").unlink(),
        r"judge\.path: .* judge\.safetensors nor state_dict\.pt",
    ),
    "no scale": (without_scale, r"judge\.path: .* has no logit_scale"),
    "a projection too wide": (too_wide, r"judge\.path: .*visual_projection\.weight \(12, 65\).* numbers"),
    "not finite": (not_finite, r"judge\.path: .*logit_scale"),
    "code in the pickle": (lambda f: torch.save({"x": print}, f / "state_dict.pt"), r"judge\.path: .*may run code"),
    "no UNet": (lambda f: shutil.rmtree(f / "unet"), r"judge\.path: .*unet"),
    "another kind": (lambda f: (f / "judge.json").write_text('{"kind": "spm"}'), r"judge\.kind: found latent.*'spm'"),
    "a bad record": (lambda f: (f / "judge.json").write_text('{"kind": "latent"}'), r"judge\.path: .*guidance"),
}


@pytest.mark.parametrize("spoil, names", FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_no_latent_judge_is_refused(case, spoil, names, tmp_path):
    folder = broken(case.folder, tmp_path / "judge")
    spoil(folder)
    with pytest.raises(UserError, match=names):
        load(SimpleNamespace(folder=folder, diffusion=case.diffusion))


def test_a_judge_of_another_base_model_is_refused(case):
    other = replace(case.diffusion.family, name="other", title="Another")
    diffusion = SimpleNamespace(family=other, latent_shape=(4, 16, 16), device=CPU)
    with pytest.raises(UserError, match=r"judge\.path: .* reads latents of .*, but model\.path is Another"):
        load(SimpleNamespace(folder=case.folder, diffusion=diffusion))


@pytest.fixture
def based(case):
    """What a judge that is a LoRA needs of its base model, with the UNet and the text encoders of the case's judge."""
    network = load(case).network
    base = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(case.folder / "unet"))
    base.load_state_dict(network.unet.state_dict(), strict=False)
    diffusion = copy(case.diffusion)
    diffusion.text_encoders = list(network.encoders)
    return SimpleNamespace(unet=base.requires_grad_(False), diffusion=diffusion, network=network)


def a_lora(case, based):
    """A judge that is a LoRA of rank 2 on the case's networks, with the case's projections, and is not the identity."""
    full = based.network
    network = LatentNetwork(
        latent_files._sharing(based.unet), full.encoders, full.visual_projection, full.text_projection, full.logit_scale
    )
    network.add_lora(2, seed=0)
    judge = LatentJudge(network, based.diffusion, 1.0, t_of_step=False)
    judge.unfreeze()
    with torch.no_grad():
        for name, value in network.unet.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    return judge


def test_a_judge_that_is_a_lora_trains_and_saves_that_and_its_projections_alone(case, based, tmp_path):
    judge = a_lora(case, based)
    trained = [name for name, value in judge.network.named_parameters() if value.requires_grad]
    assert {name.split(".")[0] for name in trained if "lora_" not in name} <= {
        "visual_projection", "text_projection", "logit_scale",
    }  # fmt: skip
    latent_files.save(tmp_path, judge)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "judge.safetensors"]
    config = JudgeConfig(path=str(tmp_path), kind="latent")
    again = latent_files.load(config, based.diffusion, based.unet, torch.float32)
    latents = torch.randn(3, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = scored(judge, latents, 501, 951)
    torch.testing.assert_close(scored(again, latents, 501, 951), expected, rtol=0, atol=1e-3)
    plain = LatentJudge(based.network, based.diffusion, 1.0, t_of_step=False)
    assert (scored(plain, latents, 501, 951) - expected).abs().min() > 1e-3


def test_a_lora_shares_the_base_models_weights_but_not_what_a_policy_merges_into_them(case, based, tmp_path):
    judge = a_lora(case, based)
    weight = lambda unet: unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    shared = weight(judge.network.unet).base_layer.weight
    assert shared.data_ptr() == weight(based.unet).weight.data_ptr()
    policy = Policy(based.unet, 2, ("to_q",), seed=0)
    with torch.no_grad():
        for value in policy.parameters:
            value.fill_(0.1)
    judge.network.eval()
    latents = torch.randn(3, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = judge.encode(list("0123")).detach()
    expected, before = judge.score_latents(latents, text, 501), shared.clone()
    with merged_lora(policy.unet) as is_merged:
        assert is_merged
        assert not torch.equal(weight(based.unet).base_layer.weight, before)
        assert torch.equal(judge.score_latents(latents, text, 501), expected)
    assert weight(based.unet).base_layer.weight.data_ptr() == shared.data_ptr()


def test_a_lora_on_another_base_model_is_refused(case, based, tmp_path):
    latent_files.save(tmp_path, a_lora(case, based))
    with torch.no_grad():
        based.unet.conv_in.weight.mul_(1.1)
    config = JudgeConfig(path=str(tmp_path), kind="latent")
    with pytest.raises(UserError, match=r"judge\.path: .* is a LoRA on another base model than model\.path"):
        latent_files.load(config, based.diffusion, based.unet, torch.float32)
