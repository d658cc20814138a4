"""python -m strop.engine.export: from a run, a checkpoint or a file to each format. Refusals: test_refusals.py."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import dump
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
    config = SPOConfig(
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
        dump(config, checkpoint / "config.yaml")
    dump(config, run / "config.yaml")
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


@pytest.mark.parametrize(
    "source, form",
    [
        (".", "diffusers"),
        ("lora", "kohya"),
        ("checkpoints/000002", "diffusers"),
        ("lora/pytorch_lora_weights.safetensors", "kohya"),
        ("lora/run_kohya.safetensors", "diffusers"),
    ],
)
def test_converts_whatever_a_run_leaves(run, tmp_path, source, form, capsys):
    target = tmp_path / "new" / "mine.safetensors"
    main([str(run / source), "--format", form, "--out", str(target)])
    expected, written = read(run / "lora" / "pytorch_lora_weights.safetensors"), read(target)
    assert_same(written.state(), expected.state())
    assert written.alpha == expected.alpha
    assert written.facts["strop.base_model"] == expected.facts["strop.base_model"]
    assert written.facts["modelspec.title"] == "mine"
    printed = capsys.readouterr().out
    assert [words for words in (str(target), "32", "rank 4", "float32", "iteration 2") if words not in printed] == []


def test_there_and_back_is_the_same_file_of_tensors(run, tmp_path):
    """From a folder with one LoRA of any name; a folder gets the name that its format asks for."""
    diffusers, one, two = "pytorch_lora_weights.safetensors", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    main([str(run), "--format", "kohya", "--out", str(one)])
    main([str(one), "--format", "diffusers", "--out", str(two)])
    assert [[file.name for file in folder.iterdir()] for folder in (one, two)] == [["one.safetensors"], [diffusers]]
    assert_same(load_file(one / "one.safetensors"), load_file(run / "lora" / "run_kohya.safetensors"))
    assert_same(load_file(two / diffusers), load_file(run / "lora" / diffusers))


@pytest.mark.parametrize("final", [1, None], ids=["went on after its LoRA", "never ended"])
def test_a_run_without_a_last_lora_gives_its_newest_checkpoint(tmp_path, tiny_folder, final):
    policies = leave_run(tmp_path / "run", tiny_folder, final=final)
    main([str(tmp_path / "run"), "--format", "diffusers", "--out", str(tmp_path / "mine")])
    assert_same(read(tmp_path / "mine" / "pytorch_lora_weights.safetensors").state(), policies[2].lora_state())


def test_dtype(run, tmp_path):
    main([str(run), "--format", "kohya", "--out", str(tmp_path / "a.safetensors"), "--dtype", "bfloat16"])
    narrow, wide = load_file(tmp_path / "a.safetensors"), load_file(run / "lora" / "run_kohya.safetensors")
    assert_same(narrow, {name: v if name.endswith("alpha") else v.to(torch.bfloat16) for name, v in wide.items()})


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipeline("a b c", num_inference_steps=3, generator=noise, output_type="np").images)


@pytest.mark.parametrize("family, targets", [("sd15", ("to_q", "conv1", "proj_in")), ("sdxl", ATTENTION)], ids=str)
@torch.no_grad()
def test_merged_weights_draw_the_image_of_the_lora(family, targets, tiny_folder, tiny_sdxl_folder, tmp_path, capsys):
    folder = {"sd15": tiny_folder, "sdxl": tiny_sdxl_folder}[family]
    leave_run(tmp_path / "run", folder, sizes=(0.2,), final=1, targets=targets)
    main([str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "mine")])
    assert str(tmp_path / "mine") in capsys.readouterr().out
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    pipeline = PIPELINES[family].from_pretrained(folder)
    bare = image(pipeline)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    expected = image(pipeline)
    drawn = image(PIPELINES[family].from_pretrained(folder, unet=merged))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    assert (bare - expected).abs().max() > 0.01


@torch.no_grad()
def test_merging_is_the_sum_in_float32(run, tmp_path, tiny_folder):
    main([str(run), "--format", "merged", "--out", str(tmp_path / "mine"), "--dtype", "float16"])
    assert len({file.stat().st_mode for file in (tmp_path / "mine" / "unet").iterdir()}) == 1
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet").state_dict()
    lora = read(run / "lora" / "pytorch_lora_weights.safetensors")
    for name, value in UNet2DConditionModel.from_pretrained(tiny_folder / "unet").state_dict().items():
        layer = name.removesuffix(".weight")
        exact = value.double()
        if layer in lora.down:
            exact = exact + lora.up[layer].double() @ lora.down[layer].double()
        torch.testing.assert_close(merged[name].double(), exact, rtol=2**-10, atol=1e-6)


def test_another_base_of_the_same_family(tmp_path, tiny_folder):
    """Of a LoRA that does not name its own."""
    lora = trained(tiny_folder, 0.1).save_lora(tmp_path)
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (file,) = (other / "unet").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    main([str(lora), "--format", "merged", "--out", str(tmp_path / "mine"), "--base", str(other)])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "mine" / "unet")
    assert torch.equal(merged.conv_in.weight, UNet2DConditionModel.from_pretrained(other / "unet").conv_in.weight)


def test_a_base_that_is_one_file(tiny_sdxl_file, tiny_sdxl_folder, tmp_path):
    leave_run(tmp_path / "run", tiny_sdxl_folder, sizes=(0.2,), final=1)
    for name, base in (("a", [tiny_sdxl_folder]), ("b", [tiny_sdxl_file, "--components", tiny_sdxl_folder])):
        arguments = [tmp_path / "run", "--format", "merged", "--out", tmp_path / name]
        main([str(a) for a in [*arguments, "--base", *base]])
    a, b = (UNet2DConditionModel.from_pretrained(tmp_path / name / "unet").state_dict() for name in "ab")
    assert_same(a, b)
