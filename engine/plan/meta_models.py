"""Builds the networks of a recipe without its weights: on the meta device to measure them, or with random weights.

Nothing is downloaded. The architecture is that of the configuration files where model.path is a folder of this machine,
else that of the family's original, and `source` says which. The classes are those that a run uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..config.online import OnlineConfig, SamplingConfig
from ..config.settings import varied
from ..config.training import Config, JudgeConfig, ModelConfig
from ..errors import UserError
from ..judge.clip import TimeConditionedCLIP
from ..judge.find import AnyJudge
from ..judge.latent import LatentJudge, LatentNetwork, feature_width
from ..judge.latent_files import check_type_of_lora, record_of
from ..judge.model import StepAwarePreferenceModel
from ..judge.pickscore import PICKSCORE
from ..models.base_model import DTYPES, KINDS, latent_shape, network_kind
from ..models.conditioning import Conditioning
from ..models.families.base import Family
from ..models.families.find import family_guessed, family_of_file, family_of_folder
from ..models.latent_diffusion import LatentDiffusion, TextEncoding
from ..models.model_files import read_config, read_index
from ..models.policy import Policy
from ..models.tiny_decoder import TinyDecoder
from ..schedules.ddim import ddim_schedule
from ..schedules.schedule import Schedule


@dataclass(frozen=True, slots=True)
class ModelBuilder:
    """A recipe with the configurations of its networks, which it builds.

    parts: configurations by name, as in Family.architecture; judge_config: of the judge's CLIP; source: where they come
    from, in words; device: where networks are built.
    """

    config: Config
    family: Family
    parts: dict[str, dict]
    judge_config: CLIPConfig
    source: str
    device: torch.device | str = "meta"

    @classmethod
    def of(cls, config: Config, family: Family | None = None, device: torch.device | str = "meta") -> ModelBuilder:
        """Reads the configurations. family: of a model that is not on this machine; None guesses it from the name.

        Raises UserError where the files are of no model that strop trains.
        """
        base_family, parts, source = _base_model(config.model, family)
        judge, judge_source = _judge(config.judge)
        source += f"; judge: {judge_source}"
        if config.auditor:
            source += f"; auditor: {_judge(config.auditor, 'audit')[1]}"
        return cls(config, base_family, parts, judge, source, device)

    def policy(self) -> Policy:
        """Builds the UNet with its LoRA; upsampling is not folded and gradient checkpointing is off."""
        lora = self.config.lora
        unet = self.unet()
        with torch.device(self.device):
            return Policy(unet, lora.rank, lora.target_modules, 0, self.latent_shape)

    def unet(self) -> UNet2DConditionModel:
        return self._built(lambda: KINDS["unet"].from_config(self.parts["unet"]), self.dtype)

    def decoder(self) -> TinyDecoder | None:
        """Builds rollout.decoder, None where there is none; a hub id is taken to be of TAESD's architecture."""
        path = self.config.models_read.get("rollout.decoder")
        if path is None:
            return None
        folder = Path(path)
        config = read_config(folder, "", "rollout.decoder") if folder.is_dir() else {}
        network = self._built(lambda: KINDS["tiny_decoder"].from_config(config), self.dtype)
        return TinyDecoder(network, self.config.model.decode_rows)

    def diffusion(self) -> LatentDiffusion:
        """Builds the text encoders, the VAE and the scheduler."""
        kinds = {name: network_kind(self.family, name) for name in self.family.text_encoders}
        encoder = lambda name: kinds[name](kinds[name].config_class(**self.parts[name]))
        encoders = [self._built(lambda name=name: encoder(name), self.dtype) for name in kinds]
        vae = self._built(lambda: KINDS["vae"].from_config(self.parts["vae"]), self.vae_dtype)
        tokenizers = [BlankTokenizer(encoder.config.max_position_embeddings, self.device) for encoder in encoders]
        scheduler = DDIMScheduler.from_config(self.parts["scheduler"])
        shape, rows = self.latent_shape, self.config.model.decode_rows
        text = TextEncoding(tokenizers, encoders, self.zero_null)
        return LatentDiffusion(self.family, text, vae, scheduler, shape, rows)

    def judge(self) -> AnyJudge:
        """Builds the judge of the recipe; a latent one has the architecture of the base model's own encoders."""
        if self.config.judge.kind == LatentJudge.kind:
            return self.latent_judge()
        judge = self.pixel_judge()
        judge.clip.cast(self.judge_dtype)
        return judge

    def auditor(self) -> AnyJudge:
        """Builds the auditor of the recipe: the judge of the same recipe with the auditor's keys as its judge's."""
        auditor = self.config.auditor
        config = varied(self.config, {f"judge.{key}": getattr(auditor, key) for key in JudgeConfig.model_fields})
        return replace(self, config=config, judge_config=_judge(auditor, "audit")[0]).judge()

    def pixel_judge(self) -> StepAwarePreferenceModel:
        """Builds a judge of images, in float32 as published."""
        modulated = self.config.judge.kind != "pickscore"
        clip = self._built(lambda: TimeConditionedCLIP(CLIPModel(self.judge_config), modulated), torch.float32)
        tokenizer = BlankTokenizer(self.judge_config.text_config.max_position_embeddings, self.device)
        clip.freeze()
        return StepAwarePreferenceModel(clip, tokenizer, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, self.config.judge.kind)

    def latent_judge(self) -> LatentJudge:
        diffusion, unet = self.diffusion(), self.unet()
        projected = self.family.pooled_width(self.parts["unet"]) is None
        encoders = diffusion.text_encoders
        for network in (unet, *encoders):
            nn.Module.to(network, self.judge_dtype)
        width = encoders[-1].config.hidden_size if projected else encoders[-1].config.projection_dim
        drawn = lambda rows, out: self._built(lambda: nn.Linear(rows, out, bias=False), torch.float32).weight
        visual, text = drawn(feature_width(unet), width), drawn(width, width) if projected else None
        scale = torch.full((), self.judge_config.logit_scale_init_value, device=self.device)
        network = LatentNetwork(unet, encoders, visual, text, scale)
        judge, record = self.config.judge, record_of(Path(self.config.judge.path))
        if record.get("lora_rank"):
            check_type_of_lora(Path(judge.path), self.judge_dtype, self.dtype)
            network.add_lora(record["lora_rank"], 0)
        return LatentJudge(network, diffusion, record["guidance"] if judge.guidance is None else judge.guidance, True)

    def _built(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        """Returns the network of `make()` on this device and in `dtype`; PyTorch's default type stays what it is."""
        with torch.device(self.device):
            return nn.Module.to(make(), dtype)  # diffusers' own `to` warns of parts in float32, though there are none

    def schedule(self, device: str) -> Schedule:
        """Returns the schedule of the rollout, where there is none one of the default steps."""
        rollout = self.config.rollout if isinstance(self.config, OnlineConfig) else SamplingConfig()
        scheduler = DDIMScheduler.from_config(self.parts["scheduler"])
        return ddim_schedule(scheduler, rollout.num_steps, rollout.eta, rollout.guidance, device)

    def conditioning(self, prompts: int) -> Conditioning:
        """Returns uninitialised conditioning of so many prompts."""
        unet, empty = self.parts["unet"], lambda *shape: torch.empty(shape, device=self.device, dtype=self.dtype)
        length, width = self.parts["text_encoder"].get("max_position_embeddings", 77), unet["cross_attention_dim"]
        judge = torch.empty(prompts, self.judge_config.projection_dim, device=self.device)
        cond = Conditioning(empty(prompts, length, width), empty(1, length, width), judge)
        pooled, time_ids = self.family.pooled_width(unet), self.family.time_ids(*self.size)
        if pooled is not None:
            cond = replace(cond, pooled=empty(prompts, pooled), null_pooled=empty(1, pooled))
        return cond if time_ids is None else replace(cond, time_ids=empty(1, len(time_ids)))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.model.dtype]

    @property
    def judge_dtype(self) -> torch.dtype:
        return DTYPES[self.config.judge.computed_in(self.config.model)]

    @property
    def vae_dtype(self) -> torch.dtype:
        """The type in which base_model.py loads the VAE."""
        return self.family.vae_dtype(self.parts["vae"], self.dtype)

    @property
    def factor(self) -> int:
        """How many pixels one number of a latent spans, in height and in width."""
        return 2 ** (len(self.parts["vae"]["block_out_channels"]) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return latent_shape(self.config.model, self.parts["unet"], self.factor, self.config.model.path)

    @property
    def multiple(self) -> int:
        """How many times as high and wide as its smallest tensors a UNet's latents are."""
        return 2 ** (len(self.parts["unet"].get("block_out_channels", range(4))) - 1)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        _, height, width = self.latent_shape
        return height * self.factor, width * self.factor

    @property
    def zero_null(self) -> bool:
        """Whether the empty prompt is embedded as zeros, not as its encoding."""
        return self.family.zero_null(self.parts["model_index"])


class BlankTokenizer:
    """Gives every prompt token 0, as many times as a text encoder takes tokens."""

    def __init__(self, length: int, device: torch.device | str):
        self.model_max_length, self.device = length, device

    def __call__(self, prompts: Sequence[str], padding: str = "", **_) -> SimpleNamespace:
        if not padding:  # asked for how long the prompts are
            return SimpleNamespace(input_ids=[[0]] * len(prompts))
        shape = (len(prompts), self.model_max_length)
        return SimpleNamespace(input_ids=torch.zeros(shape, dtype=torch.int64, device=self.device))


def _base_model(model: ModelConfig, family: Family | None) -> tuple[Family, dict[str, dict], str]:
    """Returns (family, configurations by part, where they come from)."""
    path = Path(model.path)
    folder = path if path.is_dir() else Path(model.components) if model.components else None
    if folder is not None and folder.is_dir():
        key = "model.path" if path.is_dir() else "model.components"
        family = family_of_folder(folder, key)
        names = ("unet", "vae", *family.text_encoders, "scheduler")
        parts = {name: read_config(folder, name, key) for name in names} | {"model_index": read_index(folder, key)}
        source = f"the configuration files in {folder}"
    else:
        if path.is_file():
            family, why = family_of_file(path, "model.path", own_vae=model.vae is None), f"{path} is"
        elif family:
            why = "--family says"
        else:
            family, why = family_guessed(model.path), f"the name of {model.path}, not on this machine, says"
        parts, source = dict(family.architecture), f"that of engine/models/families/{family.name}.py, as {why}"
    vae = Path(model.vae) if model.vae else None
    if vae and vae.is_dir():
        parts["vae"] = read_config(vae, "vae" if (vae / "vae").is_dir() else "", "model.vae")
    elif vae:  # not here, and taken not to overflow
        parts["vae"] = parts["vae"] | {"force_upcast": False}
    return family, parts, source


def _judge(judge: JudgeConfig, section: str = "judge") -> tuple[CLIPConfig, str]:
    """Returns (configuration of the judge's CLIP, where it comes from). section: of the recipe, for messages."""
    if judge.kind == LatentJudge.kind:  # CLIPs are then those of the published code alone
        return CLIPConfig(**PICKSCORE), "the base model's own encoders"
    folders = [Path(path) for path in (judge.path, judge.components) if path]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        return CLIPConfig(**PICKSCORE), "PickScore's CLIP, ViT-H/14"
    kind = read_config(folder.parent, folder.name, f"{section}.path").get("model_type")
    if kind != "clip":
        raise UserError(f"{section}.path: {folder / 'config.json'} is of a model of type {kind}, expected clip")
    return CLIPConfig.from_pretrained(folder), f"the config.json in {folder}"
