"""models/lora_file: every name of both formats at full size, and files that diffusers opens to the very same model."""

import json
import os
import stat

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import differences
from strop.engine.errors import UserError
from strop.engine.models.families.find import family_named
from strop.engine.models.lora_file import ADAPTER, LORA_FILE, Lora, facts, read, write
from strop.engine.models.policy import Policy

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BEYOND = ("to_q", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj", "conv_in")  # linear layers and convolutions
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
FORMATS = ("diffusers", "kohya")


@pytest.fixture(params=["sd15", "sdxl"])
def family(request):
    return request.param


@pytest.fixture
def folder(family, tiny_folder, tiny_sdxl_folder):
    return {"sd15": tiny_folder, "sdxl": tiny_sdxl_folder}[family]


@pytest.fixture
def pipeline(family, folder):
    """pipeline() -> a fresh diffusers pipeline of the family."""

    def load():
        pipeline = PIPELINES[family].from_pretrained(folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture
def full_size(family, architectures):
    """The UNet of the family as it is published, without its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(architectures[family]["unet"])


def layers_of(unet):
    return [name for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


def trained(unet, rank=4, targets=ATTENTION):
    """A policy whose LoRA has an effect, as after training."""
    policy = Policy(unet, rank, targets, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters:
            p.copy_(torch.randn(p.shape, generator=rng) / rank)
    return policy


def saved(policy, form, folder, **options):
    return write(policy.lora(), folder / f"a_{form}.safetensors", form, **options)


def image(pipeline):
    noise = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipeline("a b c", num_inference_steps=2, generator=noise, output_type="np").images)


def deltas(unet, adapter):
    """What the adapter in a diffusers model adds to each layer."""
    return {n: m.get_delta_weight(adapter) for n, m in unet.named_modules() if adapter in getattr(m, "lora_A", {})}


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    "family, base, layers, rank, parameters",
    [("sd15", 859_520_964, 128, 4, 797_184), ("sdxl", 2_567_463_684, 560, 64, 92_897_280)],
    ids=["sd15", "sdxl"],
)
def test_layers_and_parameters_at_full_size(full_size, family, base, layers, rank, parameters):
    assert sum(p.numel() for p in full_size.parameters()) == base
    policy = Policy(full_size, rank, ATTENTION, seed=0)
    assert len(policy.lora().down) == layers
    assert all(".transformer_blocks." in name for name in policy.lora().down)
    assert sum(p.numel() for p in policy.parameters) == parameters
    assert policy.family.name == family


@pytest.mark.parametrize("family, layers", [("sd15", 128), ("sdxl", 560)], ids=["sd15", "sdxl"])
def test_every_name_at_full_size(full_size, family, layers, tmp_path):
    """Both formats and diffusers' own conversions of them: one set of names, nothing twice, nothing lost."""
    names = [name for name in layers_of(full_size) if name.endswith(ATTENTION)]
    rng = torch.Generator().manual_seed(0)
    down = {name: torch.randn(4, 3, generator=rng) for name in names}
    up = {name: torch.randn(5, 4, generator=rng) for name in names}
    lora = Lora(down, up, dict.fromkeys(names, 4))
    diffusers = write(lora, tmp_path / "a.safetensors", "diffusers")
    kohya = write(lora, tmp_path / "b.safetensors", "kohya")

    flat = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    assert len(set(flat)) == len(names) == layers
    assert set(load_file(diffusers)) == {f"unet.{n}.lora.{p}.weight" for n in names for p in ("down", "up")}
    assert set(load_file(kohya)) == {f"{n}.{p}" for n in flat for p in ("lora_down.weight", "lora_up.weight", "alpha")}
    if family == "sdxl":
        block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1"
        assert {f"{block}_to_q.lora_down.weight", f"{block}_to_out_0.lora_down.weight"} < set(load_file(kohya))

    peft = {f"unet.{name}": value for name, value in lora.state().items()}
    expected = {name: value.float() for name, value in convert_state_dict_to_kohya(peft).items()}
    assert_same(load_file(kohya), expected)
    converted, alphas = PIPELINES[family].lora_state_dict(load_file(kohya))
    assert_same(convert_unet_state_dict_to_peft(converted), peft)
    assert set(alphas.values()) == {4.0}
    assert len(alphas) == layers
    for file in (diffusers, kohya):
        assert_same(read(file).state(), lora.state())
        assert read(file).alpha == lora.alpha


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("form", FORMATS)
def test_the_name_of_any_layer_is_read_back(full_size, form, tmp_path):
    names = layers_of(full_size)
    assert len(names) > 250
    lora = Lora({n: torch.zeros(1, 2) for n in names}, {n: torch.zeros(2, 1) for n in names}, dict.fromkeys(names, 1))
    assert read(write(lora, tmp_path / "a.safetensors", form)).down.keys() == set(names)


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_a_fresh_pipeline_draws_the_very_same_image(pipeline, form, tmp_path):
    one, other, bare = pipeline(), pipeline(), pipeline()
    policy = trained(one.unet)
    other.load_lora_weights(saved(policy, form, tmp_path))
    expected = image(one)
    assert torch.equal(image(other), expected)
    assert (image(bare) - expected).abs().max() > 0.01


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_any_layers_at_rank_64(pipeline, form, tmp_path):
    """The order of the names in the file must not matter to diffusers, which judges the file by the first of them."""
    policy, other = trained(pipeline().unet, 64, BEYOND), pipeline()
    names = policy.lora().down
    assert all(any(name.endswith(target) for name in names) for target in BEYOND)
    other.load_lora_weights(saved(policy, form, tmp_path), adapter_name="a")
    lora, actual = policy.lora(), deltas(other.unet, "a")
    assert actual.keys() == lora.down.keys()
    for name, delta in actual.items():
        torch.testing.assert_close(delta, lora.delta(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_another_scale_and_mixed_ranks_survive(pipeline, form, tmp_path):
    unet = pipeline().unet
    rng = torch.Generator().manual_seed(0)
    weights = {n: m.weight for n, m in unet.named_modules() if n.endswith(("to_q", "to_v"))}
    rank = {name: 3 if name.endswith("to_v") else 6 for name in weights}
    lora = Lora(
        {name: torch.randn(rank[name], w.shape[1], generator=rng) for name, w in weights.items()},
        {name: torch.randn(w.shape[0], rank[name], generator=rng) for name, w in weights.items()},
        {name: 1.5 if name.endswith("to_v") else 2.0 for name in weights},
    )
    file = write(lora, tmp_path / "a.safetensors", form)
    again, other = read(file), pipeline()
    assert again.alpha == lora.alpha
    assert again.ranks == rank
    if form == "kohya":  # diffusers does not find alphas again that differ between layers: a limit of its reader
        return
    other.load_lora_weights(file, adapter_name="a")
    for name, delta in deltas(other.unet, "a").items():
        torch.testing.assert_close(delta, lora.delta(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_file_is_the_rounded_lora(policy, form, dtype, tmp_path):
    lora = trained(UNet2DConditionModel.from_config(policy.unet.config)).lora()
    actual = read(write(lora, tmp_path / "a.safetensors", form, dtype))
    assert_same(actual.state(), {name: value.to(dtype) for name, value in lora.state().items()})
    assert actual.alpha == lora.alpha


def test_delta_in_float64(policy):
    lora = trained(UNet2DConditionModel.from_config(policy.unet.config), targets=("conv1", "to_q")).lora()
    for name in lora.down:
        down, up = lora.down[name].double(), lora.up[name].double()
        expected = torch.einsum("orij,rchw->ochw", up, down) if down.ndim == 4 else up @ down
        torch.testing.assert_close(lora.delta(name).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def config(tmp_path):
    return SPOConfig(
        model={"path": "somebody/a-model", "width": 768},
        judge={"path": "judge"},
        prompts={"train": "train.txt"},
        run={"dir": str(tmp_path / "run"), "iterations": 9},
    )


@pytest.mark.parametrize("form", FORMATS)
def test_the_header_says_where_it_comes_from(policy, config, form, tmp_path):
    file = write(policy.lora(facts(config, family_named("sdxl"), 7)), tmp_path / "mine.safetensors", form)
    actual = header(file)
    recipe = SPOConfig.model_validate_json(actual["strop.config"])
    assert differences(config, recipe) == [f"run.dir: {str(tmp_path / 'run')!r} -> 'run'"]
    expected = {
        "strop.base_model": "somebody/a-model",
        "strop.family": "sdxl",
        "strop.iteration": "7",
        "strop.rank": "4",
        "strop.alpha": "4",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_output_name": "mine",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "mine",
        "modelspec.resolution": "768x1024",
    }
    assert {name: actual[name] for name in expected} == expected
    assert (LORA_ADAPTER_METADATA_KEY in actual) == (form == "diffusers"), "diffusers refuses kohya's alphas beside it"
    if form == "diffusers":
        adapter = json.loads(actual[ADAPTER])
        assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 4)
        assert set(adapter["unet.target_modules"]) == policy.lora().down.keys()
    assert (ADAPTER, LORA_FILE) == (LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE)


def test_a_published_file_names_no_place_of_this_machine(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/base", "judges/mine"):
        (tmp_path / folder).mkdir(parents=True)
    config = SPOConfig(
        model={"path": str(tmp_path / "models" / "base"), "vae": "somebody/a-vae"},
        judge={"path": "judges/mine"},
        prompts={"train": str(tmp_path / "train.txt"), "heldout": "/home/me/heldout.txt"},
        evaluate={"scorers": [f"pickscore={tmp_path}/pick.bin", "hpsv2", "package.module:make"]},
        run={"dir": str(tmp_path / "runs" / "mine"), "iterations": 9},
    )
    file = policy.save_lora(tmp_path / "out", facts(config, family_named("sd15"), 7))
    actual = header(file)
    assert not [
        name for name, value in actual.items() if "/home" in value or str(tmp_path) in value or "/mine" in value
    ]
    recipe = SPOConfig.model_validate_json(actual["strop.config"])
    assert (recipe.model.path, recipe.model.vae, recipe.judge.path) == ("base", "somebody/a-vae", "mine")
    assert (recipe.prompts.train, recipe.prompts.heldout) == ("train.txt", "heldout.txt")
    assert recipe.evaluate.scorers == ("pickscore=pick.bin", "hpsv2", "package.module:make")
    assert {actual[name] for name in ("strop.base_model", "ss_sd_model_name")} == {"base"}
    assert {actual[name] for name in ("modelspec.title", "ss_output_name")} == {"mine"}, "not that of every LoRA"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_mode_that_the_umask_gives(policy, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        file = policy.save_lora(tmp_path)
        assert stat.S_IMODE(policy.save_lora(tmp_path).stat().st_mode) == stat.S_IMODE(file.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_converting_keeps_the_header(policy, config, tmp_path):
    first = write(policy.lora(facts(config, family_named("sd15"), 7)), tmp_path / "a.safetensors", "diffusers")
    second = write(read(first), tmp_path / "b.safetensors", "kohya")
    third = write(read(second), tmp_path / "a2.safetensors", "diffusers")
    expected = header(first) | {"ss_output_name": "a2", "modelspec.title": "a2"}
    assert header(third) == expected
    assert header(second)["ss_base_model_version"] == "sd_v1"
    assert_same(load_file(first), load_file(third))


LAYER = "mid_block.attentions.0.proj_in"
DOWN, UP = f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight"
KOHYA_ALPHA = "lora_unet_mid_block_attentions_0_proj_in.alpha"
TWO, ONE = torch.zeros(2, 3), torch.zeros(3, 1)


def patterns(value):
    return {ADAPTER: json.dumps({"unet.alpha_pattern": value})}


@pytest.mark.parametrize("pattern", [LAYER, "proj_in", "attentions.0.proj_in"])
def test_an_alpha_is_that_of_the_end_of_a_name(pattern, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({DOWN: TWO, UP: TWO.T.contiguous()}, file, metadata=patterns({"j_in": 7, pattern: 5}))
    assert read(file).alpha == {LAYER: 5.0}


@pytest.mark.parametrize(
    "tensors, header, sentence",
    [
        ({}, {"format": "pt"}, "no tensors"),
        ({"conv_in.weight": TWO}, {}, "found conv_in.weight among its 1"),
        ({"text_encoder.layers.0.lora.down.weight": TWO}, {}, "found text_encoder.layers.0.lora.down.weight"),
        ({"lora_te1_text_model_q.lora_down.weight": TWO}, {}, "found lora_te1_text_model_q.lora_down.weight"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": TWO}, {}, "found lora_unet_input_blocks_4_1_proj_in"),
        ({DOWN: TWO}, {}, f"two factors of {LAYER} "),
        ({DOWN: TWO, UP: ONE}, {}, f"two factors of {LAYER} "),
        ({DOWN: TWO, UP: TWO.T}, {ADAPTER: json.dumps({"unet.use_rslora": True})}, "rsLoRA"),
        ({DOWN: TWO, UP: TWO.T}, {ADAPTER: "{"}, "cannot be read"),
        ({DOWN: TWO, UP: TWO.T}, {ADAPTER: "[" * 100_000}, "nested"),
        ({DOWN: TWO, UP: TWO.T}, {ADAPTER: "[1]"}, "is [1], expected an object"),
        ({DOWN: TWO, UP: TWO.T}, patterns([1]), "expected an object"),
        ({DOWN: TWO, UP: TWO.T}, patterns({"(a+)+$": 1}), "alpha_pattern holds '(a+)+$'"),
        ({DOWN: TWO, UP: TWO.T}, patterns({LAYER: "1"}), f"alpha of '{LAYER}' is '1'"),
        ({DOWN: TWO, UP: TWO.T}, {ADAPTER: '{"unet.lora_alpha": NaN}'}, "alpha of 'lora_alpha' is nan"),
        ({DOWN: torch.zeros(0, 3), UP: torch.zeros(3, 0)}, {}, f"two factors of {LAYER} "),
        ({DOWN: torch.zeros(2), UP: torch.zeros(2)}, {}, f"two factors of {LAYER} "),
        ({DOWN: torch.zeros(()), UP: TWO.T}, {}, f"two factors of {LAYER} "),
        ({KOHYA_ALPHA: torch.zeros(2)}, {}, f"found {KOHYA_ALPHA} among"),
        (None, b"", "cannot be read"),
        (None, b"not a tensor in sight", "cannot be read"),
    ],
)
def test_what_is_no_lora_is_refused(tensors, header, sentence, tmp_path):
    file = tmp_path / "a.safetensors"
    if tensors is None:
        file.write_bytes(header)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata=header)
    with pytest.raises(UserError, match=f"^{file}:? ") as refused:
        read(file)
    assert sentence in str(refused.value)
