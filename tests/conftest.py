"""What several test modules share: golden numbers and the tiny models behind them (tests/golden/README.md)."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pynvml
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from strop.engine import train, train_judge
from strop.engine.config.training import ModelConfig
from strop.engine.models.base_model import load_unet
from strop.engine.models.families.find import FAMILIES
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@functools.cache
def module_of(file):
    """The tests of a file of this folder, "judge/test_clip.py": for parity.py, whatever sys.path has of these names."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, Path(__file__).parent / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="session")
def golden():
    """golden("case1_ddim") -> its tensors by name, for reading only."""
    return load_golden


@pytest.fixture(scope="session")
def alphas():
    """Cumulative alphas of Stable Diffusion's noise schedule (1000,)."""
    return load_golden("case1_ddim")["schedule/alphas_cumprod"]


@pytest.fixture(scope="session")
def tokenizer():
    return letters()


def letters():
    """A CLIP tokenizer of 64 tokens, a letter each: 0 starts a text, 63 ends and fills it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)} | {f"spare{i}": i for i in range(len(pieces), 63)}
    return CLIPTokenizer(vocab=vocab | {"<|endoftext|>": 63}, merges=[], model_max_length=16)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A whole Stable Diffusion 1.5 folder of the golden models: 8x8 latents, 16x16 images, 16 tokens.

    Shared by all tests: not to be written to.
    """
    return write_sd15(tmp_path_factory.mktemp("tiny-sd15"), tokenizer)


def write_sd15(folder, tokenizer):
    made, parts = golden_parts("sd15", UNet2DConditionModel, AutoencoderKL, CLIPTextModel)
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler.from_config(made["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory, tokenizer):
    """A whole SDXL folder of the golden models: two tokenizers that fill up differently, Euler's scheduler.

    Shared by all tests: not to be written to.
    """
    return write_sdxl(tmp_path_factory.mktemp("tiny-sdxl"), tokenizer)


def write_sdxl(folder, tokenizer):
    made, parts = golden_parts("sdxl", UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    tokenizer_2 = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=[], model_max_length=16, pad_token="spare60")
    betas = {key: made["scheduler"][key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def golden_parts(family, *kinds):
    """(tiny_configs.json of `family`, its networks by name), kinds in the order unet, vae, text encoders."""
    made, weights = json.loads((GOLDEN / "tiny_configs.json").read_text())[family], load_golden(f"tiny_{family}_models")
    parts = {}
    for name, kind in zip(("unet", "vae", "text_encoder", "text_encoder_2"), kinds, strict=False):
        config = made["ctor"][name]
        parts[name] = kind(kind.config_class(**config)) if name.startswith("text") else kind(**config)
        state = part(weights, f"{name}.")
        if name == "text_encoder":  # newer transformers have no wrapper around it
            state = {key.removeprefix("text_model."): value for key, value in state.items()}
            getattr(parts[name], "text_model", parts[name]).load_state_dict(state)
        else:
            parts[name].load_state_dict(state)
    return made, parts


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory, tiny_folder):
    """tiny_folder as one checkpoint in the key format of the original code. Not to be written to."""
    file = tmp_path_factory.mktemp("tiny-sd15-file") / "model.safetensors"
    save_file(original_keys(tiny_folder), file)
    return file


@pytest.fixture(scope="session")
def tiny_sdxl_file(tmp_path_factory, tiny_sdxl_folder):
    """tiny_sdxl_folder as one checkpoint in the key format of the original code. Not to be written to."""
    file = tmp_path_factory.mktemp("tiny-sdxl-file") / "model.safetensors"
    save_file(original_keys(tiny_sdxl_folder), file)
    return file


def original_keys(folder):
    """The tensors of a folder under the names, and in the shapes, of the original code's checkpoints."""

    def tensors(name):
        (file,) = (folder / name).glob("*.safetensors")
        return load_file(file)

    unet = json.loads((folder / "unet" / "config.json").read_text())
    made = {f"model.diffusion_model.{original_unet_key(k, unet)}": v for k, v in tensors("unet").items()}
    for key, value in tensors("vae").items():
        old = original_vae_key(key, blocks=2)
        convolution = ".attn_1." in old and value.ndim == 2
        made[f"first_stage_model.{old}"] = value[:, :, None, None].contiguous() if convolution else value
    two = (folder / "text_encoder_2").is_dir()
    prefix = "conditioner.embedders.0.transformer." if two else "cond_stage_model.transformer."
    text = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in tensors("text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
    made |= {f"{prefix}{key}": value for key, value in text.items()}
    if two:
        made |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(tensors("text_encoder_2")).items()}
    return made


def original_unet_key(key, config):
    layers, blocks = config["layers_per_block"], len(config["block_out_channels"])
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    fixed |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
    fixed |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}
    fixed |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    fixed |= {"mid_block.resnets.1": "middle_block.2"}
    for b in range(blocks):
        first, attends = 1 + b * (layers + 1), "CrossAttn" in config["up_block_types"][b]
        for i in range(layers):
            fixed[f"down_blocks.{b}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            fixed[f"down_blocks.{b}.attentions.{i}"] = f"input_blocks.{first + i}.1"
        fixed[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        for i in range(layers + 1):
            fixed[f"up_blocks.{b}.resnets.{i}"] = f"output_blocks.{b * (layers + 1) + i}.0"
            fixed[f"up_blocks.{b}.attentions.{i}"] = f"output_blocks.{b * (layers + 1) + i}.1"
        last = b * (layers + 1) + layers
        fixed[f"up_blocks.{b}.upsamplers.0"] = f"output_blocks.{last}.{2 if attends else 1}"
    within = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    within |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    (start,) = [name for name in fixed if key.startswith(f"{name}.")]
    rest = key.removeprefix(f"{start}.").split(".")
    if ".resnets." in key:
        rest[0] = within[rest[0]]
    return ".".join([fixed[start], *rest])


def original_vae_key(key, blocks):
    for i in range(blocks):
        key = key.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{blocks - 1 - i}.")
    for new, old in {
        "down_blocks": "down",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "resnets": "block",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
    }.items():
        key = key.replace(new, old)
    return key


def open_clip(state):
    made = {}
    for key, value in state.items():
        for new, old in {
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.encoder.layers": "transformer.resblocks",
            "text_model.final_layer_norm": "ln_final",
            "text_projection.weight": "text_projection",
            "layer_norm": "ln_",
            "self_attn": "attn",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            key = key.replace(new, old)
        made[key] = value.T.contiguous() if key == "text_projection" else value
    for first in [key for key in made if ".q_proj." in key]:
        joined = torch.cat([made.pop(first.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")])
        made[first.replace("q_proj.", "in_proj_")] = joined
    return made | {"logit_scale": torch.tensor(4.6)}


@pytest.fixture(scope="session")
def architectures():
    """architectures["sdxl"]["unet"] is the configuration of the real one, of its weights nothing."""
    return {family.name: family.architecture for family in FAMILIES}


@pytest.fixture(scope="session")
def diffusion(tiny_folder):
    return LatentDiffusion.load(ModelConfig(path=str(tiny_folder)), CPU)


@pytest.fixture
def policy(tiny_folder):
    """A fresh policy of rank 4 on the golden UNet."""
    return Policy(load_unet(ModelConfig(path=str(tiny_folder)), CPU), 4, LORA_TARGETS, seed=0)


@pytest.fixture(params=["sd15", "sdxl"])
def model(request, tiny_folder, tiny_sdxl_folder):
    """A policy away from its base, with the Conditioning of three prompts; of each family."""
    settings = ModelConfig(path=str(tiny_folder if request.param == "sd15" else tiny_sdxl_folder))
    policy = Policy(load_unet(settings, CPU), 4, LORA_TARGETS, seed=0)
    rng = torch.Generator().manual_seed(1)
    for p in policy.parameters:
        p.data.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return policy, LatentDiffusion.load(settings, CPU).encode(["a b", "c", "x y z"])


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory):
    """An AutoencoderTiny of random weights for the golden models: two pixels to a latent's side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
        network = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    folder = tmp_path_factory.mktemp("tiny-decoder")
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spm():
    return golden_spm()


def golden_spm():
    """The golden preference model: config, image mean and std, its weights and those of the plain CLIP beneath."""
    made = json.loads((GOLDEN / "case2_config.json").read_text())
    state = part(load_golden("case2_spm_state_dict"), "model.")
    plain = {k: v for k, v in state.items() if "adaLN_modulation" not in k and not k.startswith("t_embedder.")}
    config = CLIPConfig(**made["clip_config"])
    return SimpleNamespace(config=config, mean=made["image_mean"], std=made["image_std"], state=state, plain=plain)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, spm, tokenizer):
    """A plain CLIP folder as transformers writes it. Shared by all tests: not to be written to."""
    folder = tmp_path_factory.mktemp("clip")
    clip = CLIPModel(spm.config)
    clip.load_state_dict(spm.plain)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = {"image_mean": spm.mean, "image_std": spm.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


@pytest.fixture(scope="session")
def pair_files():
    """Preference pairs as users have them: rows of Pick-a-Pic with small JPEGs, written as parquet or as JSON lines."""
    return SimpleNamespace(jpeg=jpeg, rows=bright_rows, parquet=write_parquet, jsonl=write_jsonl)


def jpeg(light, seed, size=(20, 24)):
    """The bytes of a noisy grey image of about this light (0 to 1), of (height, width) pixels."""
    noise = torch.rand(*size, 3, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
    pixels = ((light + noise).clamp(0, 1) * 255).byte().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


def bright_rows(count):
    """Bright against dark: the brighter image is preferred, every eighth pair is a tie, captions come round."""
    rows = []
    for i in range(count):
        light = 0.2 + 0.6 * torch.rand(2, generator=torch.Generator().manual_seed(i))
        label = 0.5 if i % 8 == 7 else float(light[0] > light[1])
        images = {f"jpg_{side}": jpeg(light[side].item(), 2 * i + side) for side in (0, 1)}
        labels = {"label_0": label, "label_1": 1 - label, "has_label": True, "are_different": True}
        rows.append(
            {**images, **labels, "caption": f"{'abcd'[i % 4]} {'efgh'[i // 8 % 4]}", "num_example_per_prompt": 2}
        )
    return rows


def write_parquet(folder, rows, group=5):
    """Two files of row groups of `group` rows; in the second, images are {bytes, path} as `datasets` writes them."""
    folder.mkdir()
    half = len(rows) // 2
    parquet.write_table(pa.Table.from_pylist(rows[:half]), folder / "train-00000.parquet", row_group_size=group)
    wrapped = [row | {f"jpg_{i}": {"bytes": row[f"jpg_{i}"], "path": None} for i in (0, 1)} for row in rows[half:]]
    parquet.write_table(pa.Table.from_pylist(wrapped), folder / "train-00001.parquet", row_group_size=group)
    return folder


def write_jsonl(folder, rows):
    """folder/pairs.jsonl, its images in folder/images."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows):
        line = {"caption": row["caption"], "label": {1.0: 0, 0.0: 1, 0.5: "tie"}[row["label_0"]]}
        for side in (0, 1):
            (folder / "images" / f"{i}-{side}.jpg").write_bytes(row[f"jpg_{side}"])
            line[f"image_{side}"] = f"images/{i}-{side}.jpg"
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


class FakeNvml:
    """NVML of a machine with two cards, of which CUDA shows the second as its only one: the numbers of an A100.

    `answers` are what each query says in turn, the last one for ever; a name in `missing` is not supported.
    """

    SHOWN, HIDDEN = "8d3a-second", "1f0e-first"

    def __init__(self, monkeypatch):
        self.answers = {
            "MigMode": [[0, 0]],
            "TotalEnergyConsumption": [7_000_000, 7_300_000, 7_700_000],  # mJ
            "PowerUsage": [300_000, 400_000],  # mW
            "UtilizationRates": [100, 40],
            "ClockInfo 1": [1410, 1110],
            "ClockInfo 2": [1593],
            "CurrentClocksEventReasons": [0],
        }
        self.missing = set()
        self.asked = {}
        self.here = True
        for name in {key.split()[0] for key in self.answers}:
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", functools.partial(self.ask, name))
        monkeypatch.setattr(pynvml, "nvmlInit", self.init)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self.handle)
        properties = SimpleNamespace(uuid=self.SHOWN)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def init(self):
        if not self.here:
            raise pynvml.NVMLError_LibraryNotFound()

    def handle(self, uuid):
        if uuid not in (f"GPU-{self.HIDDEN}", f"GPU-{self.SHOWN}"):
            raise pynvml.NVMLError_NotFound()
        return uuid

    def ask(self, name, handle, *kind):
        assert handle == f"GPU-{self.SHOWN}", "another card's numbers"
        key = " ".join([name, *map(str, kind)])
        turn = self.asked[key] = self.asked.get(key, -1) + 1
        if key in self.missing:
            raise pynvml.NVMLError_NotSupported()
        answers = self.answers[key]
        answer = answers[min(turn, len(answers) - 1)]
        return SimpleNamespace(gpu=answer) if name == "UtilizationRates" else answer


@pytest.fixture
def nvml(monkeypatch):
    """A machine with NVML, in place of this one's: cuda:0 is its second card."""
    return FakeNvml(monkeypatch)


TRAINING = {
    "judge": {"kind": "pickscore"},
    "rollout": {"prompts": 2, "k": 2, "num_steps": 5, "t_range": [0, 401], "threshold": 0.0},
    "optim": {"lr": 1e-2, "micro_batch": 4},
    "evaluate": {"prompts": 3, "num_steps": 2, "batch": 2, "pictures": 2, "scorers": ["recipe_modules:examiner"]},
    "run": {"iterations": 2, "save_every": 1, "device": "cpu"},
}
SAMPLED = {"prompts": 2, "num_steps": 4}
PAIRS = {"source": "recipe_modules:pairs", "train": 40}
METHODS = {  # the sections in which methods differ from TRAINING; None leaves one out
    "spo": {},
    "gradspo": {},
    "d3po": {"rollout": SAMPLED},
    "ddpo": {"rollout": SAMPLED, "optim": {"updates": 2}},
    "diffusion_dpo": {"rollout": None, "data": PAIRS, "optim": {"accumulate": 2, "warmup": 0}},
    "mapo": {"rollout": None, "data": PAIRS},
}
JUDGE_TRAINING = {
    "judge": {},
    "data": {"source": "recipe_modules:pairs", "train": 40, "heldout": 20},
    "optim": {"steps": 6, "batch": 8, "lr": 1e-3, "warmup": 2, "clean_share": 0.25},
    "run": {"device": "cpu", "log_every": 2, "save_every": 2},
}
MODULES = '''
import torch

def examiner(device):
    def examine(images, prompts):
        words = images.new_tensor([len(prompt.split()) for prompt in prompts])
        return {"brightness": images.mean((1, 2, 3)), "words": words}
    return examine

def gloomy(device):
    return lambda images, prompts: {"gloom": images.new_tensor([float("nan" if p == "h i" else 1) for p in prompts])}

def pairs(seed, size):
    """Bright against dark: the brighter image is preferred; every eighth pair is a tie."""
    rng = torch.Generator().manual_seed(seed)
    light = torch.rand(size, 2, 1, 1, 1, generator=rng) * 1.6 - 0.8
    images = (light + 0.1 * torch.randn(size, 2, 3, 16, 16, generator=rng)).clamp(-1, 1)
    label = (light[:, 0] > light[:, 1]).double().flatten()
    label[::8] = 0.5
    return [
        {"image_0": a, "image_1": b, "caption": "ab", "label_0": p, "label_1": 1 - p}
        for (a, b), p in zip(images, label.tolist())
    ]

def ties(seed, size):
    return [pair | {"label_0": 0.5, "label_1": 0.5} for pair in pairs(seed, size)]
'''


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory, tiny_folder, clip_folder):
    """training.yaml and judge.yaml, recipes of runs of a second, with prompts, and the pairs and examiner they name.

    Shared by all tests: not to be written to.
    """
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipe_modules.py").write_text(MODULES)
    (folder / "train.txt").write_text("a b c\nd e\n\nf\n")
    (folder / "heldout.txt").write_text("g\nh i\nj k l\n")
    prompts = {"prompts": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")}}
    for name, sections in (("training", TRAINING | prompts), ("judge", JUDGE_TRAINING)):
        models = {"model": {"path": str(tiny_folder)}, "judge": sections["judge"] | {"path": str(clip_folder)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sections | models))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def recipe(recipe_folder, tmp_path):
    """recipe("run.iterations=1") -> the command line of a training in tmp_path/run; judge=True: of a judge's."""

    def command_line(*overrides, judge=False):
        file = recipe_folder / ("judge.yaml" if judge else "training.yaml")
        return [str(file), f"run.dir={tmp_path / 'run'}", *overrides]

    return command_line


@pytest.fixture(scope="session")
def recipe_of_method(recipe_folder):
    """recipe_of_method(folder, "ddpo", "run.iterations=1") -> the command line of a training in folder/run by a method.

    It shares the models, prompts and sections of training.yaml, without the keys of SPO's rollout, and with pairs
    without the training prompts.
    """

    def command_line(folder, method, *overrides):
        tree = yaml.safe_load((recipe_folder / "training.yaml").read_text()) | {"method": method}
        tree |= METHODS[method] | {"optim": tree["optim"] | METHODS[method].get("optim", {})}
        if "data" in tree:
            del tree["prompts"]["train"]
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
        return [str(file), f"run.dir={folder / 'run'}", *overrides]

    return command_line


@pytest.fixture
def method_recipe(recipe_of_method, tmp_path):
    """recipe_of_method of a test's own folder."""
    return functools.partial(recipe_of_method, tmp_path)


def run_once(main, arguments, folder):
    """What a command printed, and the run folder it left."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*arguments, f"run.dir={folder}"])
    return SimpleNamespace(folder=folder, printed=printed.getvalue())


@pytest.fixture
def file_recipe(recipe, tmp_path, pair_files):
    """file_recipe("parquet", ...) -> the command line of a judge's short training on 32 pairs in files, cached."""

    def make(form, *overrides):
        source = tmp_path / form
        if not source.exists():
            getattr(pair_files, form)(source, pair_files.rows(32))
        source = source / "pairs.jsonl" if form == "jsonl" else source
        data = ("data.train=null", "data.heldout=6", f"data.source={source}", f"data.cache={tmp_path / 'cache'}")
        return recipe(*data, "optim.steps=3", "optim.batch=4", "optim.clean_share=0", *overrides, judge=True)

    return make


@pytest.fixture(scope="session")
def training_run(recipe_folder, tmp_path_factory):
    """The recipe training.yaml, run once for all tests: .folder, not to be written to, and .printed."""
    arguments = ["--local_rank=0", str(recipe_folder / "training.yaml")]
    return run_once(train.main, arguments, tmp_path_factory.mktemp("training") / "run")


@pytest.fixture(scope="session")
def judge_run(recipe_folder, tmp_path_factory):
    """The recipe judge.yaml, run once for all tests: .folder, not to be written to, and .printed."""
    arguments = ["--local_rank=0", str(recipe_folder / "judge.yaml")]
    return run_once(train_judge.main, arguments, tmp_path_factory.mktemp("judge") / "run")


class Started:
    """A command in a process group of its own. said(): what it has printed until now, stderr included."""

    def __init__(self, command, file, environment):
        self.file = file
        with open(file, "wb") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=out, start_new_session=True, env=os.environ | environment
            )

    def said(self):
        return self.file.read_text(errors="replace")

    def until(self, condition, seconds=120):
        """Waits until the condition holds; fails with what was printed where it does not, or the command ends first."""
        late = time.monotonic() + seconds
        while not (met := condition()):
            assert self.process.poll() is None, f"exit code {self.process.returncode}\n{self.said()[-4000:]}"
            assert time.monotonic() < late, f"not after {seconds} s\n{self.said()[-4000:]}"
            time.sleep(0.02)
        return met

    def exit_code(self, seconds=240):
        """Waits for the end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s\n{self.said()[-4000:]}")

    def until_alone(self, seconds=60):
        """Waits until no other process of the group is alive, where the command itself has ended."""
        self.exit_code()
        late = time.monotonic() + seconds
        while alive := group_of(self.process.pid):
            assert time.monotonic() < late, f"alive after {seconds} s: {alive}\n{self.said()[-4000:]}"
            time.sleep(0.02)

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def group_of(leader):
    """Process ids of a process group, zombies left out."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = file.read_text().rpartition(")")[2].split()[:3]
            pids += [int(file.parent.name)] * (int(group) == leader and state != "Z")
    return pids


@pytest.fixture(scope="session")
def launch(tmp_path_factory, recipe_folder):
    """launch(script, *arguments) starts a script in two processes by `deepspeed`, as a context manager -> Started.

    by: the words before the script in place of the launcher's, such as torchrun's. Whatever was started ends with the
    block, also where a test fails or takes too long.
    """

    @contextlib.contextmanager
    def start(script, *arguments, by=None, **environment):
        port = free_port()
        by = by or (bin_folder / "deepspeed", "--num_accelerators", 2, "--master_port", port)
        printed = tmp_path_factory.mktemp("launch") / "printed"
        started = Started([*by, script, *arguments], printed, common | environment)
        started.port = port
        try:
            yield started
        finally:
            started.end()

    bin_folder = Path(sys.executable).parent
    paths = {"PATH": (str(bin_folder), os.environ["PATH"])}
    paths["PYTHONPATH"] = (str(recipe_folder), os.environ.get("PYTHONPATH", ""))
    common = {name: os.pathsep.join(filter(None, path)) for name, path in paths.items()} | {"OMP_NUM_THREADS": "1"}
    return start


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
