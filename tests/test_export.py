"""python -m strop.engine.export: from a run, a checkpoint or a file to each format; each refusal is one sentence."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from strop.engine.config.training import Config
from strop.engine.export import main
from strop.engine.models.lora_file import facts, read, write
from strop.engine.models.policy import Policy

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def trained(folder, size, targets=ATTENTION):
    policy = Policy(UNet2DConditionModel.from_pretrained(folder / "unet"), 4, targets, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters:
            p.copy_(size * torch.randn(p.shape, generator=rng))
    return policy


def leave_run(run, folder, sizes=(0.1, 0.2), final=2, targets=ATTENTION):
    """A run folder with a checkpoint for each of `sizes`, and a LoRA of the iteration `final`."""
    config = Config(
        model={"path": str(folder)},
        judge={"path": "judge"},
        prompts={"train": "train.txt"},
        run={"dir": str(run), "iterations": len(sizes)},
    )
    policies = {i: trained(folder, size, targets) for i, size in enumerate(sizes, start=1)}
    for i, policy in policies.items():
        checkpoint = run / "checkpoints" / f"{i:06d}"
        policy.save_lora(checkpoint, facts(config, policy.family, i))
        (checkpoint / "state.json").write_text("{}")
    if final:
        about = facts(config, policies[final].family, final)
        policies[final].save_lora(run / "lora", about)
        write(policies[final].lora(about), run / "lora" / "run_kohya.safetensors", "kohya")
    return policies


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A finished run of two iterations. Not to be written to."""
    folder = tmp_path_factory.mktemp("of-one") / "run"
    leave_run(folder, tiny_folder)
    return folder


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "source",
    [
        ".",
        "lora",
        "checkpoints/000002",
        "lora/pytorch_lora_weights.safetensors",
        "lora/run_kohya.safetensors",
    ],
    ids=["run", "lora-folder", "checkpoint", "diffusers-file", "kohya-file"],
)
def test_converts_whatever_a_run_leaves(run, tmp_path, source, form, capsys):
    target = tmp_path / "new" / "mine.safetensors"
    main([str(run / source), "--format", form, "--out", str(target)])
    expected = read(run / "lora" / "pytorch_lora_weights.safetensors")
    found = read(target)
    assert_same(found.state(), expected.state())
    assert found.alpha == expected.alpha
    assert found.facts["strop.base_model"] == expected.facts["strop.base_model"]
    assert found.facts["modelspec.title"] == "mine"
    printed = capsys.readouterr().out
    assert str(target) in printed
    assert "32 layers of rank 4, float32, 0.0 MiB" in printed
    assert "iteration 2" in printed


def test_there_and_back_is_the_same_file_of_tensors(run, tmp_path):
    main([str(run), "--format", "kohya", "--out", str(tmp_path / "a.safetensors")])
    main([str(tmp_path / "a.safetensors"), "--format", "diffusers", "--out", str(tmp_path / "b")])
    lora = "pytorch_lora_weights.safetensors"
    assert_same(load_file(tmp_path / "b" / lora), load_file(run / "lora" / lora))
    assert_same(load_file(tmp_path / "a.safetensors"), load_file(run / "lora" / "run_kohya.safetensors"))


def test_a_folder_gets_the_name_that_its_format_asks_for(run, tmp_path):
    main([str(run), "--format", "diffusers", "--out", str(tmp_path / "mine")])
    main([str(run), "--format", "kohya", "--out", str(tmp_path / "mine")])
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"pytorch_lora_weights.safetensors", "mine.safetensors"}


def test_a_run_that_went_on_after_its_lora_gives_its_newest_checkpoint(tmp_path, tiny_folder):
    policies = leave_run(tmp_path / "run", tiny_folder, sizes=(0.1, 0.2, 0.3), final=1)
    main([str(tmp_path / "run"), "--format", "diffusers", "--out", str(tmp_path / "mine")])
    assert_same(read(tmp_path / "mine" / "pytorch_lora_weights.safetensors").state(), policies[3].lora_state())


def test_a_run_that_never_ended_gives_its_newest_checkpoint(tmp_path, tiny_folder):
    policies = leave_run(tmp_path / "run", tiny_folder, final=None)
    main([str(tmp_path / "run"), "--format", "diffusers", "--out", str(tmp_path / "mine")])
    assert_same(read(tmp_path / "mine" / "pytorch_lora_weights.safetensors").state(), policies[2].lora_state())


def test_a_folder_with_one_lora_of_any_name(run, tmp_path):
    (tmp_path / "loras").mkdir()
    shutil.copy(run / "lora" / "run_kohya.safetensors", tmp_path / "loras")
    main([str(tmp_path / "loras"), "--format", "diffusers", "--out", str(tmp_path / "mine")])
    assert len(read(tmp_path / "mine" / "pytorch_lora_weights.safetensors").down) == 32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(run, tmp_path, dtype):
    main([str(run), "--format", "kohya", "--out", str(tmp_path / "a.safetensors"), "--dtype", dtype])
    found, wide = load_file(tmp_path / "a.safetensors"), load_file(run / "lora" / "run_kohya.safetensors")
    kept = {name: value if name.endswith("alpha") else value.to(getattr(torch, dtype)) for name, value in wide.items()}
    assert_same(found, kept)


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipeline("a b c", num_inference_steps=3, generator=noise, output_type="np").images)


@pytest.mark.parametrize("targets", [ATTENTION, ("to_q", "conv1", "proj_in")], ids=["attention", "convolutions"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.no_grad()
def test_merged_weights_draw_the_image_of_the_lora(family, targets, tiny_folder, tiny_sdxl_folder, tmp_path, capsys):
    folder = {"sd15": tiny_folder, "sdxl": tiny_sdxl_folder}[family]
    leave_run(tmp_path / "run", folder, sizes=(0.2,), final=1, targets=targets)
    main([str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "mine")])
    assert "UNet merged with" in capsys.readouterr().out
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    pipeline = PIPELINES[family].from_pretrained(folder)
    bare = image(pipeline)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    expected = image(pipeline)
    found = image(PIPELINES[family].from_pretrained(folder, unet=merged))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (bare - expected).abs().max() > 0.01


@torch.no_grad()
def test_merging_is_the_sum_in_float32(run, tmp_path, tiny_folder):
    main([str(run), "--format", "merged", "--out", str(tmp_path / "mine"), "--dtype", "float16"])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet").state_dict()
    lora = read(run / "lora" / "pytorch_lora_weights.safetensors")
    for name, value in UNet2DConditionModel.from_pretrained(tiny_folder / "unet").state_dict().items():
        layer = name.removesuffix(".weight")
        exact = value.double()
        if layer in lora.down:
            exact = exact + lora.up[layer].double() @ lora.down[layer].double()
        torch.testing.assert_close(merged[name].double(), exact, rtol=2**-10, atol=1e-6)


def test_another_base_of_the_same_family(run, tmp_path, tiny_folder):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (file,) = (other / "unet").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    main([str(run), "--format", "merged", "--out", str(tmp_path / "mine"), "--base", str(other)])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet")
    assert torch.equal(merged.conv_in.weight, UNet2DConditionModel.from_pretrained(other / "unet").conv_in.weight)


def test_a_base_that_is_one_file(tiny_sdxl_file, tiny_sdxl_folder, tmp_path):
    leave_run(tmp_path / "run", tiny_sdxl_folder, sizes=(0.2,), final=1)
    for name, base in (("a", [tiny_sdxl_folder]), ("b", [tiny_sdxl_file, "--components", tiny_sdxl_folder])):
        arguments = [tmp_path / "run", "--format", "merged", "--out", tmp_path / name]
        main([str(a) for a in [*arguments, "--base", *base]])
    a, b = (UNet2DConditionModel.from_pretrained(tmp_path / name / "unet").state_dict() for name in "ab")
    assert_same(a, b)


def refused(arguments, capsys):
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("strop: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "source, options, sentence",
    [
        ("nowhere", {}, "no file or folder nowhere; expected a run, a checkpoint or a LoRA"),
        ("{run}/checkpoints", {}, "checkpoints holds no LoRA and no finished checkpoint"),
        ("{model}/unet/diffusion_pytorch_model.safetensors", {}, "is no LoRA of a Stable Diffusion UNet alone"),
        ("{model}/unet/config.json", {}, "config.json cannot be read as a LoRA"),
        ("{run}", {"format": "onnx"}, "--format: found 'onnx', expected one of diffusers, kohya, merged"),
        ("{run}", {"dtype": "float8"}, "--dtype: found 'float8', expected one of float32, bfloat16, float16"),
        ("{run}", {"out": "{run}/lora"}, "pytorch_lora_weights.safetensors is there already; choose another place"),
        ("{run}", {"out": "{run}/lora/run_kohya.safetensors"}, "run_kohya.safetensors is there already"),
        ("{run}", {"format": "merged", "out": "{model}"}, "unet is there already; choose another place"),
        (
            "{run}",
            {"format": "merged", "out": "a.safetensors"},
            "--out: found the file a.safetensors, expected a folder",
        ),
        ("{run}", {"out": "{model}/model_index.json/a"}, "cannot be written"),
        ("{run}", {"format": "merged", "base": "nowhere"}, "nowhere"),
        ("{run}", {"format": "merged", "base": "{sdxl}"}, "(sd15) does not fit the UNet of"),
    ],
)
def test_bad_input_gets_one_sentence(run, tiny_folder, tiny_sdxl_folder, tmp_path, source, options, sentence, capsys):
    places = {"run": run, "model": tiny_folder, "sdxl": tiny_sdxl_folder}
    options = {"format": "diffusers", "out": str(tmp_path / "new")} | options
    before = sorted(run.rglob("*"))
    arguments = [part for name, value in options.items() for part in (f"--{name}", value.format(**places))]
    assert sentence in refused([source.format(**places), *arguments], capsys)
    assert not (tmp_path / "new").exists()
    assert sorted(run.rglob("*")) == before


def test_an_sdxl_lora_on_sd15(tiny_folder, tiny_sdxl_folder, tmp_path, capsys):
    leave_run(tmp_path / "xl", tiny_sdxl_folder, sizes=(0.2,), final=1)
    out = ["--format", "merged", "--out", tmp_path / "new"]
    error = refused([tmp_path / "xl", *out, "--base", tiny_folder], capsys)
    assert "(sdxl) does not fit the UNet of" in error
    assert "name a model of the LoRA's own family with --base" in error
    assert not (tmp_path / "new").exists()


def test_a_lora_that_does_not_say_its_base(tiny_folder, tmp_path, capsys):
    file = trained(tiny_folder, 0.1).save_lora(tmp_path)
    arguments = [file, "--format", "merged", "--out", tmp_path / "new"]
    assert "does not say which model it was trained on; name it with --base" in refused(arguments, capsys)
    main([str(argument) for argument in [*arguments, "--base", tiny_folder]])
    assert (tmp_path / "new" / "unet" / "config.json").is_file()


def test_a_folder_of_several_loras_asks_for_one(run, tmp_path, capsys):
    (tmp_path / "loras").mkdir()
    for name in ("a", "b"):
        shutil.copy(run / "lora" / "run_kohya.safetensors", tmp_path / "loras" / f"{name}.safetensors")
    error = refused([tmp_path / "loras", "--format", "kohya", "--out", tmp_path / "new"], capsys)
    assert "holds 2 .safetensors files, expected one LoRA; name the file" in error
