"""scorers: files that are missing, damaged or another scorer's are refused in one sentence that names them."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from strop.engine.errors import UserError
from strop.engine.scorers import find
from strop.engine.scorers import scorer as scorers
from strop.engine.scorers.files import Weights
from strop.engine.scorers.hpsv2 import configuration, source
from strop.engine.scorers.scorer import pil_images

EVAL = Path(__file__).parents[1] / "golden" / "eval"
HPS, REWARD, PICK = EVAL / "hps/HPS_v2.1_tiny.pt", EVAL / "imagereward/ImageReward_tiny.pt", EVAL / "pick"
TOKENIZER, BERT = str(EVAL / "tokenizer"), str(EVAL / "imagereward")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:21dd590f\nsize 3714759\n"


def sentence(name, weights, components):
    with pytest.raises(UserError) as refused:
        find.load(name, weights and str(weights), components and str(components))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@functools.cache
def tensors(file):
    state = torch.load(file, weights_only=True)
    return state.get("state_dict", state)


def beside(file, folder):
    """A copy of a file and of the configurations beside it."""
    for config in file.parent.glob("*.json"):
        shutil.copy(config, folder)
    return Path(shutil.copy(file, folder))


def damaged(file, change):
    file.write_bytes(change(file.read_bytes()))
    return file


def changed(file, change):
    state = dict(tensors(file)) if file.suffix == ".pt" else load_file(file)
    change(state)
    (torch.save if file.suffix == ".pt" else save_file)(state, file)
    return file


UNFIT = {  # scorer, file, what is done to a copy of it, what the sentence says
    "HPS as ImageReward": ("image_reward", HPS, None, ("HPSv2, expected the BLIP", "1 missing (blip.visual_encoder.")),
    "ImageReward as HPS": ("hpsv2", REWARD, None, ("holds ImageReward, expected the ViT-H/14", "text_projection")),
    "ImageReward as head": ("aesthetic", REWARD, None, ("holds ImageReward", "1 missing (layers.0.weight)")),
    "HPS as PickScore": ("pickscore", HPS, None, ("HPSv2, expected a CLIP of transformers",)),
    "cut pickle": ("hpsv2.1", HPS, lambda f: damaged(f, lambda b: b[:-5000]), ("damaged",)),
    "cut safetensors": (
        "pickscore", PICK / "model.safetensors", lambda f: damaged(f, lambda b: b[:-5000]), ("read as safetensors",),
    ),
    "pointer": ("image_reward", REWARD, lambda f: damaged(f, lambda b: POINTER.encode()), ("LFS pointer",)),
    "safetensors pointer": (
        "clip_score", PICK / "model.safetensors", lambda f: damaged(f, lambda b: POINTER.encode()), ("LFS pointer",),
    ),
    "missing": (
        "hpsv2", HPS, lambda f: changed(f, lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_bias")),
        ("HPSv2, expected", "1 missing (visual.transformer.resblocks.1.attn.in_proj_bias)"),
    ),
    "shape": (
        "image_reward", REWARD, lambda f: changed(f, lambda s: s.update({"mlp.layers.0.weight": torch.zeros(1024, 7)})),
        ("1 of the wrong shape (mlp.layers.0.weight of (1024, 7) for (1024, 48))",),
    ),
    "another configuration": (
        "pickscore", PICK / "model.safetensors", lambda f: changed(f, lambda s: s.pop("logit_scale")),
        ("do not fit the CLIP of its config.json: 1 missing (logit_scale)",),
    ),
    "dimensions": (
        "hpsv2", HPS, lambda f: changed(f, lambda s: s.update({"visual.conv1.weight": torch.zeros(48)})),
        ("missing (visual.conv1.weight)",),
    ),
    "heads": (
        "hpsv2", HPS, lambda f: (f.parent / "open_clip_config.json").unlink(),
        ("a width of 32", "768, 1024, 1280", "open_clip_config.json"),
    ),
    "unknown ending": (
        "hpsv2", HPS, lambda f: f.rename(f.with_suffix(".ckpt")), ("expected a folder, a .safetensors or a .bin, .pt",),
    ),
    "no tensors": (
        "aesthetic", HPS, lambda f: torch.save({"model": 3}, f), ("holds no state dict; found int under 'model'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_file_is_refused(case, tmp_path):
    name, original, change, words = UNFIT[case]
    file = beside(original, tmp_path)
    file = (change and change(file)) or file
    if name in ("pickscore", "clip_score"):
        shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
        shutil.copy(PICK / "config.json", tmp_path / "config.json")
        shutil.copy(PICK / "preprocessor_config.json", tmp_path)
        components = tmp_path
    else:
        components = BERT if name == "image_reward" else TOKENIZER
    said = sentence(name, file, components)
    assert said.startswith(f"{name}: ")
    assert [word for word in (str(file), *words) if word not in said] == []


def test_what_is_missing_is_named_with_its_source(tmp_path):
    nowhere, empty = str(tmp_path / "nowhere.pt"), tmp_path / "empty"
    empty.mkdir()
    sources = {
        "hpsv2": ("HPS_v2_compressed.pt", "xswu/HPSv2"),
        "hpsv2.1": ("HPS_v2.1_compressed.pt", "xswu/HPSv2"),
        "image_reward": ("ImageReward.pt", "zai-org/ImageReward"),
        "aesthetic": ("sac+logos+ava1-l14-linearMSE.pth", "github.com/christophschuhmann/improved-aesthetic-predictor"),
        "pickscore": ("model.safetensors", "yuvalkirstain/PickScore_v1"),
        "clip_score": ("model.safetensors", "openai/clip-vit-large-patch14"),
    }
    assert sources.keys() == find.LOADERS.keys()
    for name, (file, source_) in sources.items():
        said = sentence(name, empty, None)
        assert str(empty) in said
        assert file in said
        assert said.endswith(source_)
        said = sentence(name, nowhere, None)
        assert nowhere in said
        assert said.endswith(source_)
    assert sources["aesthetic"][0] in sentence("aesthetic", None, None)


def test_by_default_the_authors_files_are_fetched(monkeypatch):
    asked = []

    def fetch(path, revision, key, patterns):
        asked.append(path)
        raise UserError("no network")

    monkeypatch.setattr(scorers, "fetch", fetch)
    for name in ("pickscore", "hpsv2", "hpsv2.1", "image_reward", "clip_score"):
        assert sentence(name, None, None).startswith("no network; ")
    assert asked == [
        "yuvalkirstain/PickScore_v1",
        "xswu/HPSv2/HPS_v2_compressed.pt",
        "xswu/HPSv2/HPS_v2.1_compressed.pt",
        "zai-org/ImageReward/ImageReward.pt",
        "openai/clip-vit-large-patch14",
    ]


def test_components_that_do_not_fit_are_refused(tmp_path):
    for name, weights in (("hpsv2.1", HPS), ("image_reward", REWARD)):
        said = sentence(name, weights, tmp_path)
        assert said.startswith(f"{name} components: {tmp_path} has no tokenizer; ")
    for config in PICK.iterdir():
        shutil.copy(config, tmp_path)
    assert f"{PICK} and {tmp_path} have no tokenizer" in sentence("pickscore", PICK, tmp_path)
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    widths = dict(zip((0, 2, 4, 6, 7), ((2, 768), (2, 2), (2, 2), (2, 2), (1, 2)), strict=True))
    head = {f"layers.{i}.weight": torch.zeros(shape) for i, shape in widths.items()}
    torch.save(head | {f"layers.{i}.bias": torch.zeros(shape[0]) for i, shape in widths.items()}, tmp_path / "head.pth")
    said = sentence("aesthetic", tmp_path / "head.pth", tmp_path)
    assert said.startswith("aesthetic components: found a CLIP of 24 features, expected 768, ")
    for file in Path(TOKENIZER).iterdir():
        (tmp_path / file.name).unlink()
    vocabulary = "\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(700))))
    (tmp_path / "vocab.txt").write_text(vocabulary)
    said = sentence("image_reward", REWARD, tmp_path)
    assert f"the tokenizer in {tmp_path} has 705 tokens, but ImageReward has 602 embeddings" in said


def test_an_unknown_scorer_is_refused():
    assert "'hpsv3', expected one of pickscore, hpsv2, " in sentence("hpsv3", None, None)


def test_the_full_size_needs_no_configuration(tmp_path):
    """Heads of ViT-H/14 and its text tower; open_clip_config.json is not among what the hub has of HPS."""
    shapes = {
        "text_projection": (1024, 1024), "positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (257, 1280),
    }  # fmt: skip
    shapes |= {f"transformer.resblocks.{i}.mlp.c_fc.weight": (4096, 1024) for i in range(24)}
    shapes |= {f"visual.transformer.resblocks.{i}.mlp.c_fc.weight": (5120, 1280) for i in range(32)}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = configuration(Weights(state, tmp_path / "HPS.pt", "hpsv2", "HPS"))
    vision, text = config.vision_config, config.text_config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size) == (16, 32, 224)
    assert (text.num_attention_heads, text.num_hidden_layers, text.vocab_size) == (16, 24, 49408)
    assert source("vision_model.encoder.layers.31.self_attn.v_proj.bias")[0] == (
        "visual.transformer.resblocks.31.attn.in_proj_bias"
    )


def test_a_tensor_is_scored_as_its_png():
    values = torch.tensor([-1.5, -1, -0.999, 0, 1 / 255, 0.999, 1, 2])  # 0 is 127.5, 1/255 is 128
    (found,) = pil_images(values.view(1, 1, 1, 8).expand(1, 3, 1, 8))
    assert list(found.tobytes()[::3]) == [0, 0, 0, 128, 128, 255, 255, 255]
    images = torch.rand(2, 3, 70, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pick = find.load("pickscore", str(PICK), TOKENIZER)
    assert torch.equal(pick(images, ["a", "b"])["pickscore"], pick(pil_images(images), ["a", "b"])["pickscore"])


@pytest.mark.parametrize("name, weights, components", [("hpsv2.1", HPS, TOKENIZER), ("image_reward", REWARD, BERT)])
def test_images_of_any_mode_are_scored(name, weights, components):
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")
    images = [Image.new("RGB", (40 + 9 * i, 50), (200, 30, 90)).convert(mode) for i, mode in enumerate(modes)]
    scores = find.load(name, str(weights), components)(images, ["a picture"] * len(modes))[name]
    assert scores.isfinite().all()


def test_images_without_their_prompts_are_refused():
    pick = find.load("pickscore", str(PICK), TOKENIZER)
    for images, prompts in (([], []), (torch.zeros(2, 3, 8, 8), ["a"]), (torch.zeros(1, 8, 8, 3), ["a"])):
        with pytest.raises(ValueError, match="a scorer needs"):
            pick(images, prompts)
