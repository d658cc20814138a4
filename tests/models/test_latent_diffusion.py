"""models/latent_diffusion: text, latents and images against diffusers' own pipelines; folders that are refused."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from strop.engine.config.training import ModelConfig
from strop.engine.errors import UserError
from strop.engine.models.base_model import load_unet
from strop.engine.models.guided_unet import unet_eps
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.kernels import DDIMCoefficients

CPU = torch.device("cpu")
PROMPTS = ["a red dog", "a cat"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae(tiny_folder):
    return AutoencoderKL.from_pretrained(tiny_folder / "vae").eval()


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl_folder):
    return load(tiny_sdxl_folder)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the model folder, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def load(folder, dtype="float32"):
    return LatentDiffusion.load(ModelConfig(path=str(folder), dtype=dtype), CPU)


@torch.no_grad()
def test_the_golden_text_embeddings(diffusion, golden):
    """They were made from token ids, which the tokenizer here cannot spell; so the encoder is asked directly."""
    case6 = golden("case6_sd15_k4_b3")
    actual = diffusion.text_encoders[0](case6["in/prompt_ids"]).last_hidden_state
    torch.testing.assert_close(actual, case6["in/prompt_embeds"], rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_golden_text_embeddings_of_sdxl(sdxl, golden):
    """As above: from token ids."""
    case6 = golden("case6_sdxl_k2_b2_inner3")
    first, second = (
        encoder(case6[f"in/prompt_ids{suffix}"], output_hidden_states=True)
        for encoder, suffix in zip(sdxl.text_encoders, ("", "_2"), strict=True)
    )
    actual = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(actual, case6["in/prompt_embeds"], rtol=0, atol=2e-6)
    torch.testing.assert_close(second.text_embeds, case6["in/pooled_prompt_embeds"], rtol=0, atol=2e-6)
    null = sdxl.encode(["a"])
    assert torch.equal(null.null, case6["in/negative_prompt_embeds"][:1])
    assert torch.equal(null.null_pooled, case6["in/negative_pooled_prompt_embeds"][:1])


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_prompts_of_sdxl_are_encoded_as_diffusers_does(tiny_sdxl_folder, tmp_path, zeros):
    """force_zeros_for_empty_prompt decides what stands for no prompt."""
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index))
    expected = StableDiffusionXLPipeline.from_pretrained(folder).encode_prompt(PROMPTS)
    cond = load(folder).encode(PROMPTS)
    names = ("text", "null", "pooled", "null_pooled")
    for name, theirs in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(cond, name).expand_as(theirs), theirs, rtol=0, atol=1e-6)
    assert cond.null.any() == (not zeros)
    assert len(cond.null) == len(cond.null_pooled) == 1


def test_sdxl_is_told_the_size_in_pixels(tiny_sdxl_folder, sdxl):
    assert sdxl.encode(["a"]).time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    wide = LatentDiffusion.load(ModelConfig(path=str(tiny_sdxl_folder), height=24, width=32), CPU)
    assert wide.latent_shape == (4, 12, 16)
    assert wide.encode(["a"]).time_ids.tolist() == [[24, 32, 0, 0, 24, 32]]


def test_many_prompts_are_encoded_as_few(sdxl, monkeypatch):
    prompts = [f"{letter} cat" for letter in "abcdefg"]
    expected = sdxl.encode(prompts)
    monkeypatch.setattr("strop.engine.models.latent_diffusion.BATCH", 3)
    actual = sdxl.encode(prompts)
    torch.testing.assert_close(actual.text, expected.text, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.pooled, expected.pooled, rtol=0, atol=1e-6)


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(diffusion, capsys):
    letters = "a b c d e f g h i j k l m n"  # 16 tokens with start and end
    cond = diffusion.encode([letters])
    assert capsys.readouterr().err == ""
    longer = diffusion.encode(["a cat", f"{letters} o p", f"{letters} u v w"])
    assert longer.text.shape == (3, 16, 32)
    torch.testing.assert_close(longer.text[1:], cond.text.expand(2, -1, -1), rtol=0, atol=1e-6)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert [word for word in ("2 of 3 prompts", "16 tokens", f"'{letters} o p'") if word not in said] == []


def test_released_text_encoders_are_gone(tiny_sdxl_folder):
    model = load(tiny_sdxl_folder)
    encoders = [weakref.ref(encoder) for encoder in model.text_encoders]
    model.release_text_encoders()
    gc.collect()
    assert not any(encoder() for encoder in encoders)
    with pytest.raises(RuntimeError, match="released"):
        model.encode(["a"])
    assert model.decode(draw(1, 4, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
@torch.no_grad()
def test_decoded_latents_are_the_vaes_images(diffusion, vae, shape):
    """Not clamped to what a picture can show."""
    latents = 20 * draw(*shape, 4, 8, 8)
    images = diffusion.decode(latents)
    assert images.abs().max() > 1.5
    assert images.shape == (*shape, 3, 16, 16)
    for actual, latent in zip(images.flatten(0, -4), latents.flatten(0, -4), strict=True):
        expected = vae.decode(latent.unsqueeze(0) / 0.18215).sample[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_scale_of_latents_is_that_of_the_vae_in_use(sdxl, tiny_folder, tiny_sdxl_folder):
    latents = draw(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(sdxl.decode(latents), sdxl.vae.decode(latents / 0.13025).sample)
    other = LatentDiffusion.load(ModelConfig(path=str(tiny_sdxl_folder), vae=str(tiny_folder)), CPU)
    with torch.no_grad():
        assert torch.equal(other.decode(latents), other.vae.decode(latents / 0.18215).sample)


@pytest.mark.parametrize("safe", [True, False], ids=["as-it-is", "said-to-be-safe"])
def test_no_black_images_in_float16(tiny_sdxl_folder, tmp_path, safe):
    """A VAE whose activations go past 65504, as those of SDXL's own do; told that it does not, it fails."""
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] *= 30000 / state["decoder.conv_in.weight"].abs().max()
    save_file(state, file, metadata={"format": "pt"})
    if not safe:
        config = json.loads((folder / "vae" / "config.json").read_text()) | {"force_upcast": False}
        (folder / "vae" / "config.json").write_text(json.dumps(config))
    model = load(folder, "float16")
    assert model.encode(["a"]).text.dtype == torch.float16
    latents = draw(2, 4, 8, 8).half()
    assert model.decode(latents).isfinite().all() == safe
    expected = load(folder).decode(latents)
    assert expected.isfinite().all()
    if safe:
        assert torch.equal(model.decode(latents), expected)


def test_nothing_here_trains(diffusion):
    for module in (*diffusion.text_encoders, diffusion.vae):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert not diffusion.decode(draw(1, 4, 8, 8).requires_grad_()).requires_grad


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_schedule_is_that_of_the_folder(folder, alphas, prediction):
    config = DDIMScheduler.load_config(folder / "scheduler") | {"prediction_type": prediction, "steps_offset": 3}
    DDIMScheduler.from_config(config).save_pretrained(folder / "scheduler")
    schedule = load(folder).schedule(10, eta=0.5, guidance=7.5)
    expected = DDIMCoefficients.build(alphas, 10, 0.5, prediction, steps_offset=3)
    assert schedule.t == expected.t == (*range(903, 0, -100), 0)
    assert torch.equal(schedule._table, expected.table)
    assert schedule.guidance == 7.5


def test_the_last_step_never_starts_at_zero(folder):
    """There sigma would be 0; the sampler's spacing is not the model's, so its offset of 0 is taken for 1."""
    config = DDIMScheduler.load_config(folder / "scheduler") | {"steps_offset": 0, "timestep_spacing": "trailing"}
    DDIMScheduler.from_config(config).save_pretrained(folder / "scheduler")
    schedule = load(folder).schedule(20, eta=1.0, guidance=5.0)
    assert schedule.t == (*range(951, 0, -50), 0)
    assert schedule._table.isfinite().all()
    assert (schedule._table[4] > 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.no_grad()
def test_guided_latents_are_those_of_diffusers(tiny_folder, tiny_sdxl_folder, tmp_path, family, prediction):
    """The last latent, from the same noise by deterministic DDIM."""
    folder = shutil.copytree(tiny_folder if family == "sd15" else tiny_sdxl_folder, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction}))
    kind = StableDiffusionPipeline if family == "sd15" else StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(folder, **({"safety_checker": None} if family == "sd15" else {}))
    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    x, steps = draw(2, 4, 8, 8), {"num_inference_steps": 5, "guidance_scale": 5.0, "eta": 0.0}
    expected = pipeline(PROMPTS, latents=x, **steps, output_type="latent").images
    model, unet = load(folder), load_unet(ModelConfig(path=str(folder)), CPU)
    schedule, cond = model.schedule(5, eta=0.0, guidance=5.0), model.encode(PROMPTS)
    for step in range(5):
        x = schedule.mean(x, unet_eps(unet, x, schedule.timesteps(step, 2), cond, guided=True), step)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-5)  # up to 30 in size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_have_the_type_asked_for(tiny_folder, diffusion, dtype):
    narrow = load(tiny_folder, dtype)
    expected = getattr(torch, dtype)
    assert {p.dtype for p in narrow.vae.parameters()} == {expected}
    assert {p.dtype for p in narrow.text_encoders[0].parameters()} == {expected}
    assert narrow.encode(PROMPTS).text.dtype == expected
    latents = draw(2, 4, 8, 8)  # float32, as the rollout's are
    images, wide = narrow.decode(latents), diffusion.decode(latents)
    assert ((images.float() - wide).norm() / wide.norm()).item() < 0.03


def without(name):
    def remove(path):
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()

    return remove


def broken(name, text="{"):
    return lambda path: (path / name).write_text(text)


def altered(part, ending, shape):
    """A tensor of the part is gone, or of another shape."""

    def alter(path):
        (file,) = (path / part).glob("*.safetensors")
        state = load_file(file)
        (name,) = [name for name in state if name.endswith(ending)]
        del state[name]
        save_file(state | ({} if shape is None else {name: torch.zeros(shape)}), file, metadata={"format": "pt"})

    return alter


BIASES = {"text_encoder": "final_layer_norm.bias", "vae": "decoder.conv_out.bias", "unet": "conv_out.bias"}
CONFIGS = ("text_encoder/config.json", "vae/config.json", "scheduler/scheduler_config.json")
WEIGHTS = ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors")
UNFIT = {  # what is done to a model folder, what the sentence names
    "no folder": (shutil.rmtree, "model"),
    **{f"no {part}": (without(part), f"{part}/") for part in ("tokenizer", "scheduler", *BIASES)},
    **{f"no {file}": (without(file), file.split("/")[0]) for file in (*CONFIGS, *WEIGHTS)},
    **{f"broken {file}": (broken(file), file.split("/")[0]) for file in (*CONFIGS, "tokenizer/tokenizer.json")},
    **{f"broken {file}": (broken(file, "no tensors"), file.split("/")[0]) for file in WEIGHTS},
    **{f"without {name}": (altered(part, name, None), part) for part, name in BIASES.items()},
    **{f"misshapen {name}": (altered(part, name, 7), part) for part, name in BIASES.items()},
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_folder_is_refused_and_its_part_named(folder, case):
    """Weights are not filled up with random numbers."""
    change, words = UNFIT[case]
    change(folder)
    with pytest.raises(UserError, match=rf"^model\.path: .*{words}") as refusal:
        load(folder), load_unet(ModelConfig(path=str(folder)), CPU)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("rows", [1, 3, 9], ids=str)
def test_latents_decoded_in_parts_are_those_decoded_at_once(tiny_folder, diffusion, rows):
    latents, seen = draw(2, 2, 4, 8, 8), []
    parts = LatentDiffusion.load(ModelConfig(path=str(tiny_folder), decode_rows=rows), CPU)
    parts.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(parts.decode(latents), diffusion.decode(latents), rtol=0, atol=1e-5)
    assert max(seen) == min(rows, 4)
    assert sum(seen) == 4
