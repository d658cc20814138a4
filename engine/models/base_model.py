"""The base model as the user has it: a diffusers folder, a hub id or one checkpoint file; and its parts, loaded.

What a recipe's section `model` says is found, recognised and turned into networks here. What they are used for is
latent_diffusion.py's (text encoders, VAE, schedule) and policy.py's (UNet). Safetensors come first; a pickled file is
read with weights_only, which runs no code of it; nothing else that a repository holds is ever run.
"""

from __future__ import annotations

import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ..config.training import ModelConfig
from ..errors import UserError
from . import single_file
from .families.base import Family
from .families.find import family_of_file, family_of_folder
from .families.shared import CHANNELS
from .hub import fetch
from .model_files import read_config, read_index

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = {  # text encoders are named by the family
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "tiny_decoder": AutoencoderTiny,  # of no base model: rollout.decoder
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
    """A base model found and recognised; nothing of it is in memory yet.

    folder: in diffusers format, with the configurations and tokenizers; file: the checkpoint with the weights, None
    where they are in the folder. key: where the folder stands in the recipe, for messages.
    """

    settings: ModelConfig
    family: Family
    folder: Path
    key: str
    file: Path | None = None

    @classmethod
    def find(cls, model: ModelConfig) -> BaseModel:
        """Raises UserError, in one sentence that says what was found, for models of no family."""
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
        found = family_of_folder(folder, "model.components")
        if found.name != family.name:
            raise UserError(
                f"model.components: {folder} is of family {found.name}, expected {family.name} as {path} is"
            )
        return cls(model, family, folder, "model.components", path)

    def config(self, part: str) -> dict:
        """The configuration of a part, such as `unet`."""
        return read_config(self.folder, part, self.key)

    def part(self, name: str, dtype: torch.dtype) -> torch.nn.Module:
        """The network `name` (unet, vae or a text encoder) in `dtype` on the CPU.

        Raises UserError where a tensor is lacking.
        """
        kind = network_kind(self.family, name)
        if self.file is not None:
            prefix = self.family.prefixes[name]
            return single_file.load_from_file(kind, self.file, prefix, self.folder / name, dtype, "model.path")
        return load_network(kind, self.settings.path, self.settings.revision, name, dtype, "model.path")

    def text_encoders(self, dtype: torch.dtype) -> list[torch.nn.Module]:
        return [self.part(name, dtype) for name in self.family.text_encoders]

    def tokenizers(self) -> list[CLIPTokenizer]:
        """One for each text encoder, cutting at what that one takes."""
        return [self._tokenizer(name) for name in self.family.text_encoders]

    def scheduler(self) -> DDIMScheduler:
        """DDIM with the betas and the prediction type that the model was trained with, whatever sampler it comes with.

        Of the sampler's own settings none is kept: timesteps are spaced as DDIMCoefficients says.
        """
        said = single_file.prediction_of(self.file, "model.path") if self.file else {}
        scheduler = _load_files(DDIMScheduler, self.folder, "scheduler", self.key)
        return DDIMScheduler.from_config(scheduler.config, **said) if said else scheduler

    def vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The VAE, model.vae where it is given; in float32 where it overflows in float16 and that is `dtype`."""
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
        """Whether the empty prompt is all zeros instead of its encoding."""
        return self.family.zero_null(read_index(self.folder, self.key))

    def latent_shape(self, factor: int) -> tuple[int, int, int]:
        """(C, h, w) of model.height and width, or of the model's own size; factor: pixels of a latent's side.

        Raises UserError where the UNet cannot halve it as often as it does.
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
    """As BaseModel.latent_shape, for the configuration of a UNet that `source` has."""
    own, blocks = unet.get("sample_size"), len(unet.get("block_out_channels", range(4)))
    own = own if isinstance(own, list) else [own, own]
    multiple = factor * 2 ** (blocks - 1)
    shape = []
    for side, default in zip(("height", "width"), own, strict=True):
        pixels = getattr(model, side) or (default or 0) * factor
        if pixels == 0:
            raise UserError(f"model.{side}: null, but {source} does not say its own size; expected pixels")
        if pixels % multiple:
            raise UserError(f"model.{side}: found {pixels}, expected a multiple of {multiple} for this model")
        shape.append(pixels // factor)
    return (CHANNELS, *shape)


def load_unet(model: ModelConfig, device: torch.device) -> UNet2DConditionModel:
    """The base model's UNet on `device`, in model.dtype, with its attention and gradient checkpointing as asked.

    diffusers' own attention is SDPA. Raises UserError where the UNet is missing or xformers cannot run.
    """
    if model.attention == "xformers":
        _check_xformers(device)
    return equip(BaseModel.find(model).part("unet", DTYPES[model.dtype]).to(device), model)


def equip(unet: UNet2DConditionModel, model: ModelConfig) -> UNet2DConditionModel:
    """Gives a UNet the attention and the gradient checkpointing that are asked for, in place, and returns it."""
    if model.attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            found = " ".join(str(error).split())
            raise UserError(f"model.attention: xformers does not run on this GPU ({found}); expected sdpa") from None
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def network_kind(family: Family, part: str) -> type[torch.nn.Module]:
    """The class of a part of a base model: unet, vae or one of the family's text encoders."""
    return KINDS[part] if part in KINDS else getattr(transformers, family.text_encoders[part])


def load_network(
    kind: type[torch.nn.Module], path: str, revision: str | None, part: str, dtype: torch.dtype, key: str
) -> torch.nn.Module:
    """The network of this class in folder `part` of a local folder or hub id.

    Of a hub id only one set of weights is downloaded. Raises UserError where a file or a tensor is lacking.
    """
    text = issubclass(kind, transformers.PreTrainedModel)
    folder, variant, safe = _weights(path, revision, part, key, text)
    where = folder / part
    options = {"variant": variant, "use_safetensors": safe, "local_files_only": True, "output_loading_info": True}
    options["dtype" if text else "torch_dtype"] = dtype  # two libraries, two names
    try:
        model, found = kind.from_pretrained(where, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        found = " ".join(str(error).split())
        if not safe:
            found = "its pickled weights are broken, or more than tensors and may run code; convert them to safetensors"
        raise UserError(f"{key}: {where} cannot be loaded ({found})") from None
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise UserError(f"{key}: {where} lacks {len(lacking)} tensors, such as {lacking[0]}")
    return model


def quiet_libraries() -> None:
    """Switches off the loading bars and the advice of transformers and diffusers, which say nothing about a run."""
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _weights(path: str, revision: str | None, part: str, key: str, text: bool) -> tuple[Path, str | None, bool]:
    """The local folder of `path` with one set of weights of a part, its variant, and whether it is safetensors."""
    stem = "model" if text else "diffusion_pytorch_model"
    pickled = "pytorch_model" if text else stem
    refused = None
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
            refused = refused or error
            continue
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return folder, variant, ending == "safetensors"
    raise refused or UserError(f"{key}: {folder / part} holds no weights; expected {stem}.safetensors")


def _components(model: ModelConfig, family: Family) -> Path:
    """The folder with the configurations and tokenizers of a checkpoint file."""
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
    """A tokenizer or scheduler of folder/part."""
    if not (folder / part).is_dir():
        raise UserError(f"{key}: {folder} has no folder {part}/, which every model in diffusers format has")
    try:
        return kind.from_pretrained(folder / part, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{key}: {folder / part} cannot be loaded ({' '.join(str(error).split())})") from None


def _refuse_pickled(file: Path, key: str) -> None:
    if file.suffix in PICKLED:
        raise UserError(f"{key}: {file} is a pickled file, which may run code; convert it to .safetensors")


def _check_xformers(device: torch.device) -> None:
    if importlib.util.find_spec("xformers") is None:
        raise UserError("model.attention: xformers is not installed; `pip install strop[cuda]` brings it")
    if device.type != "cuda":
        raise UserError("model.attention: xformers needs a GPU, and there is none; expected sdpa or auto")
