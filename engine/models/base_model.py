"""Finds the base model that section `model` of a recipe names and loads its parts.

The model is a diffusers folder, a hub id or one checkpoint file. Its text encoders, VAE and schedule are used in
latent_diffusion.py, its UNet in guided_unet.py. Safetensors are preferred; a pickled file is read with weights_only,
which runs none of its code; no other code of a repository is ever run.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..config.training import ModelConfig
from ..errors import UserError, one_line, short
from . import single_file
from .families.base import Family
from .families.find import family_of_file, family_of_folder
from .families.shared import CHANNELS
from .hub import fetch
from .model_files import read_config, read_index
from .weight_files import check_finite, shards_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {  # text encoders are named by the family
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "tiny_decoder": AutoencoderTiny,  # rollout.decoder, not a part of a base model
}
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder*/config.json",
    "tokenizer*/*",
)
PICKLED = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model whose files and family are known; none of its weights are in memory yet.

    folder: the folder in diffusers format with configurations and tokenizers; file: the checkpoint with the weights,
    None if the folder has them. key: the configuration key that names the folder, for messages.
    """

    settings: ModelConfig
    family: Family
    folder: Path
    key: str
    file: Path | None = None

    @classmethod
    def find(cls, model: ModelConfig) -> BaseModel:
        """Finds the model that a recipe names. Raises UserError, which says what was found, for models of no family."""
        path = fetch(model.path, model.revision, "model.path", CONFIGS)
        if path.is_dir():
            if model.components is not None:
                raise UserError(
                    f"model.components: found {model.components}, but {path} has its own configurations; leave it out"
                )
            return cls(model, family_of_folder(path, "model.path"), path, "model.path")
        _refuse_pickled(path, "model.path")
        family = family_of_file(path, "model.path", own_vae=model.vae is None)
        folder = _components(model, family)
        components_family = family_of_folder(folder, "model.components")
        if components_family.name != family.name:
            raise UserError(
                f"model.components: {folder} is of family {components_family.name}, expected {family.name} as {path} is"
            )
        return cls(model, family, folder, "model.components", path)

    def config(self, part: str) -> dict:
        """Reads the configuration of a part, such as `unet`."""
        return read_config(self.folder, part, self.key)

    def part(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        """Loads the network `name` (unet, vae or a text encoder) in `dtype` on the CPU.

        Raises UserError if a tensor is missing.
        """
        kind = network_kind(self.family, name)
        if self.file is not None:
            prefix = self.family.prefixes[name]
            return single_file.load_from_file(kind, self.file, prefix, self.folder / name, dtype, "model.path")
        return load_network(kind, self.settings.path, self.settings.revision, name, dtype, "model.path")

    def outline(self, name: str) -> torch.nn.Module:
        """Returns the network `name` on the meta device: the names and shapes of its weights, and no numbers."""
        try:
            with torch.device("meta"):
                return network_kind(self.family, name).from_config(self.config(name))
        except Exception as error:  # as in load_network
            raise UserError(f"{self.key}: {self.folder / name} cannot be built ({one_line(error)})") from None

    def image_size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels of the images that the model draws. Raises UserError as latent_shape."""
        factor = 2 ** (len(self.config("vae").get("block_out_channels", range(4))) - 1)
        _, height, width = self.latent_shape(factor)
        return height * factor, width * factor

    def text_encoders(self, dtype: torch.dtype) -> list[torch.nn.Module]:
        return [self.part(name, dtype) for name in self.family.text_encoders]

    def tokenizers(self) -> list[CLIPTokenizer]:
        """Loads one tokenizer per text encoder; each truncates at the length that its encoder takes."""
        return [self._tokenizer(name) for name in self.family.text_encoders]

    def scheduler(self) -> DDIMScheduler:
        """Returns a DDIM scheduler with the betas and the prediction type of the model's training.

        The sampler's other settings are ignored: timesteps are spaced as DDIMCoefficients says.
        """
        prediction = single_file.prediction_of(self.file, "model.path") if self.file else {}
        scheduler = _load_files(DDIMScheduler, self.folder, "scheduler", self.key)
        return DDIMScheduler.from_config(scheduler.config, **prediction) if prediction else scheduler

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """Loads the VAE, model.vae if set, in `dtype`; in float32 if that is float16 and the VAE overflows there."""
        override = self.settings.vae
        path = fetch(override, None, "model.vae", ("config.json", "vae/config.json")) if override else None
        if path is not None and path.is_file():
            _refuse_pickled(path, "model.vae")
            config, load = self.config("vae"), lambda t: single_file.vae_of_file(path, self.folder, t, "model.vae")
        elif path is not None:
            part = "vae" if (path / "vae").is_dir() else ""
            config = read_config(path, part, "model.vae")
            load = lambda t: load_network(AutoencoderKL, override, None, part, t, "model.vae")
        else:
            config, load = self.config("vae"), lambda t: self.part("vae", t)
        self._check_vae(config, "model.vae" if override else "model.path")
        return load(self.family.vae_dtype(config, dtype))

    def zero_null(self) -> bool:
        """Whether the embedding of the empty prompt is all zeros instead of its encoding."""
        return self.family.zero_null(read_index(self.folder, self.key))

    def latent_shape(self, factor: int) -> tuple[int, int, int]:
        """Returns the shape (C, h, w) of a latent for model.height and model.width, or for the model's default size.

        factor: image pixels per latent pixel along a side. Raises UserError if the UNet cannot halve that size often
        enough.
        """
        return latent_shape(self.settings, self.config("unet"), factor, self.folder)

    def _tokenizer(self, text_encoder: str) -> CLIPTokenizer:
        part, config = text_encoder.replace("text_encoder", "tokenizer"), self.config(text_encoder)
        folder = self.folder / part
        tokenizer = _load_files(CLIPTokenizer, self.folder, part, self.key)
        # transformers makes a tokenizer of two words where there is no file of them, and one without a limit
        if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
            raise UserError(f"{self.key}: {folder} has neither tokenizer.json nor vocab.json")
        words = config.get("vocab_size", 49408)
        if len(tokenizer) > words:
            raise UserError(f"{self.key}: {folder} has {len(tokenizer)} words, and its {text_encoder} {words}")
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.get("max_position_embeddings", 77))
        return tokenizer

    def _check_vae(self, config: dict, key: str) -> None:
        kind, channels = config.get("_class_name") or config.get("model_type"), config.get("latent_channels", 4)
        if kind != "AutoencoderKL" or channels != CHANNELS:
            raise UserError(
                f"{key}: found a VAE of kind {kind} with {channels} latent channels, "
                f"expected an AutoencoderKL with {CHANNELS}"
            )
        shifts = [name for name in ("latents_mean", "latents_std", "shift_factor") if config.get(name)]
        if shifts:
            raise UserError(f"{key}: found a VAE with {' and '.join(shifts)}, expected one with a scaling_factor alone")


def latent_shape(model: ModelConfig, unet: dict, factor: int, source: Path | str) -> tuple[int, int, int]:
    """Computes BaseModel.latent_shape for the UNet configuration `unet`; source: its model, for messages."""
    default_sides, blocks = unet.get("sample_size"), len(unet.get("block_out_channels", range(4)))
    default_sides = default_sides if isinstance(default_sides, list) else [default_sides] * 2
    if len(default_sides) != 2 or not all(type(side) in (int, type(None)) for side in default_sides):
        raise UserError(f"model.path: {source} has the sample_size {short(default_sides)}, expected one or two numbers")
    multiple = factor * 2 ** (blocks - 1)
    shape = []
    for side, default in zip(("height", "width"), default_sides, strict=True):
        pixels = getattr(model, side) or (default or 0) * factor
        if pixels == 0:
            raise UserError(f"model.{side}: null, but {source} does not say its own size; expected pixels")
        if pixels % multiple:
            raise UserError(f"model.{side}: found {pixels}, expected a multiple of {multiple} for this model")
        shape.append(pixels // factor)
    return (CHANNELS, *shape)


def load_unet(model: ModelConfig, device: torch.device) -> UNet2DConditionModel:
    """Loads the base model's UNet on `device` in model.dtype, with model.attention and model.gradient_checkpointing.

    diffusers' default attention is SDPA. Raises UserError if the UNet is missing or xformers cannot run.
    """
    if model.attention == "xformers":
        _check_xformers(device)
    dtype = dtype_on(device, model.dtype, "model.dtype")
    return configure_unet(BaseModel.find(model).part("unet", dtype).to(device), model)


def configure_unet(unet: UNet2DConditionModel, model: ModelConfig) -> UNet2DConditionModel:
    """Sets model.attention and model.gradient_checkpointing on a UNet in place, and returns it. Raises UserError."""
    if model.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model.attention: xformers does not run on this GPU ({one_line(error)}); expected sdpa"
            ) from None
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def network_kind(family: Family, part: str) -> type[torch.nn.Module]:
    """Returns the class of a part of a base model: unet, vae or one of the family's text encoders."""
    return KINDS[part] if part in KINDS else getattr(transformers, family.text_encoders[part])


def load_network(
    kind: type[torch.nn.Module], path: str, revision: str | None, part: str, dtype: torch.dtype, key: str
) -> torch.nn.Module:
    """Loads a network of class `kind` from folder `part` of a local folder or hub id. key: its configuration key.

    Of a hub id only one set of weights is downloaded. Raises UserError if a file or a tensor is missing, or a tensor is
    not finite in `dtype`.
    """
    text = issubclass(kind, transformers.PreTrainedModel)
    model_folder, variant, safe = _weights(path, revision, part, key, text)
    folder = model_folder / part
    options = {"variant": variant, "use_safetensors": safe, "local_files_only": True, "output_loading_info": True}
    options["dtype" if text else "torch_dtype"] = dtype  # two libraries, two names
    try:
        model, report = kind.from_pretrained(folder, **options)
    except Exception as error:  # diffusers, transformers and torch raise many kinds for bad values of a configuration
        why = one_line(error)
        if not safe:
            why = "its pickled weights are broken, or more than tensors and may run code; convert them to safetensors"
        raise UserError(f"{key}: {folder} cannot be loaded ({why})") from None
    missing_keys = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing_keys:
        raise UserError(f"{key}: {folder} lacks {len(missing_keys)} tensors, such as {missing_keys[0]}")
    check_finite(model.state_dict(), f"{key}: {folder}")
    return model


def dtype_on(device: torch.device, name: str, key: str) -> torch.dtype:
    """Returns the type that a key of a recipe names. Raises UserError where the device does not compute in it."""
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        card = torch.cuda.get_device_name(device)
        raise UserError(f"{key}: found bfloat16, in which {card} does not compute; expected float16 or float32")
    return DTYPES[name]


def quiet_libraries() -> None:
    """Switches off the loading bars and the advice of transformers and diffusers, which say nothing about a run."""
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _weights(path: str, revision: str | None, part: str, key: str, text: bool) -> tuple[Path, str | None, bool]:
    """Returns the local folder of `path` with one set of weights of a part, the variant, and if it is safetensors."""
    stem = "model" if text else "diffusion_pytorch_model"
    pickled = "pytorch_model" if text else stem
    first_error = None
    for variant, name, ending in (
        (None, stem, "safetensors"),
        ("fp16", stem, "safetensors"),
        (None, pickled, "bin"),
        ("fp16", pickled, "bin"),
    ):
        dot = f".{variant}" if variant else ""
        files = [
            f"{name}{dot}.{ending}",
            f"{name}.{ending}.index{dot}.json",  # of weights in several files
            f"{name}{dot}-?????-of-?????.{ending}",
        ]
        patterns = [str(Path(part) / file) for file in files]
        try:
            folder = fetch(path, revision, key, [*patterns, str(Path(part) / "config.json")])
        except UserError as error:  # without the network: of two sets of weights the other may have been fetched
            first_error = first_error or error
            continue
        one_file, index = (folder / part / file for file in files[:2])
        if index.is_file() and not one_file.is_file():
            shards_of(index, key)
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return folder, variant, ending == "safetensors"
    raise first_error or UserError(f"{key}: {folder / part} holds no weights; expected {stem}.safetensors")


def _components(model: ModelConfig, family: Family) -> Path:
    """Finds the folder with the configurations and tokenizers for a checkpoint file."""
    if model.components:
        return fetch(model.components, None, "model.components", CONFIGS)
    try:
        return fetch(family.original, None, "model.components", CONFIGS)
    except UserError:
        raise UserError(
            f"model.components: null, and the configuration of {family.original} cannot be had from the hub; "
            f"name a folder in diffusers format of the same architecture as {model.path}"
        ) from None


def _load_files(kind: type, folder: Path, part: str, key: str):
    """Loads a tokenizer or scheduler from folder/part."""
    if not (folder / part).is_dir():
        raise UserError(f"{key}: {folder} has no folder {part}/, which every model in diffusers format has")
    try:
        return kind.from_pretrained(folder / part, local_files_only=True)
    except Exception as error:  # the parsers of tokenizers raise Exception itself
        raise UserError(f"{key}: {folder / part} cannot be loaded ({one_line(error)})") from None


def _refuse_pickled(file: Path, key: str) -> None:
    if file.suffix in PICKLED:
        raise UserError(f"{key}: {file} is a pickled file, which may run code; convert it to .safetensors")


def _check_xformers(device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise UserError("model.attention: found xformers, which is not installed; run `pip install strop[cuda]`")
    if device.type != "cuda":
        raise UserError("model.attention: found xformers, which needs a GPU, and there is none; expected sdpa or auto")
