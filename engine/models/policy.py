"""The policy is a UNet with a LoRA; with the LoRA switched off it is the reference, so no second UNet is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ..config.training import Config, ModelConfig
from ..errors import UserError
from ..speed.merged_lora import merged_lora
from ..speed.shared_halves import SharedHalves
from ..speed.text_kv import cached_text
from .conditioning import Conditioning
from .families.base import Family
from .families.find import family_of_unet
from .lora_file import LORA_FILE, Lora, facts, read, write


@dataclass(frozen=True, slots=True)
class Savings:
    """Settings that save work or memory and change the policy's numbers only by rounding.

    unet_rows: most rows of one UNet forward while sampling; None means no limit. merge_lora: the LoRA is merged into
    the weights while sampling. share_halves: layers before the text are computed once for both guidance halves.
    multiple: in the update, latents are padded to a multiple of this, since a compiled UNet needs a fixed row count.
    """

    unet_rows: int | None = None
    merge_lora: bool = False
    share_halves: bool = False
    multiple: int = 1

    @classmethod
    def of(cls, model: ModelConfig, micro_batch: int) -> Savings:
        """Takes the settings of section `model`; micro_batch: pairs per forward of the update."""
        return cls(model.unet_rows, model.merges_lora, model.share_halves, micro_batch if model.compile else 1)


class Policy:
    """UNet2DConditionModel with a LoRA on its attention layers; only the LoRA has gradients, in float32."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        rank: int,
        target_modules: tuple[str, ...],
        seed: int,
        latent_shape: tuple[int, int, int] | None = None,
        savings: Savings = Savings(),
    ):
        """Adds a fresh LoRA: A ~ N(0, 1/rank^2) from `seed`, B = 0, alpha = rank: policy and reference start equal.

        latent_shape: (C, h, w) of a latent; None means the UNet's default resolution.
        """
        self.unet = unet.requires_grad_(False).eval()
        self.rank = rank
        self.savings = savings
        self.is_sampling = self.is_reference = False
        size = unet.config.sample_size
        self.latent_shape = latent_shape or (unet.config.in_channels, size, size)
        config = PeftLoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(target_modules)
        )
        try:
            with torch.random.fork_rng():
                torch.random.manual_seed(seed)
                self.unet.add_adapter(config)
        except ValueError as error:
            raise UserError(f"lora.target_modules: found {list(target_modules)}; {error}") from None
        cast_training_params(self.unet, torch.float32)
        self._halves = SharedHalves(self.unet)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, which are those of the LoRA."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def eps(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool = True) -> Tensor:
        """Computes the model output for both guidance halves in one forward.

        x (N, C, H, W); step_t (N,) training timesteps; cond of N prompts. Returns (2, N, C, H, W): without the prompt,
        with the prompt; (1, N, C, H, W) when not guided. Schedule combines the halves.
        """
        forward = self._eps_in_parts if self.is_sampling else self._eps_padded
        with self._halves.shared() if guided and self.savings.share_halves else nullcontext():
            return forward(x, step_t, cond, guided)

    def _eps_in_parts(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
        """Computes eps with at most savings.unet_rows rows in one forward."""
        max_latents = (self.savings.unet_rows or 0) // (2 if guided else 1)
        if max_latents == 0 or len(x) <= max_latents:
            return unet_eps(self.unet, x, step_t, cond, guided)
        parts = [slice(start, start + max_latents) for start in range(0, len(x), max_latents)]
        return torch.cat([unet_eps(self.unet, x[p], step_t[p], cond[p], guided) for p in parts], dim=1)

    def _eps_padded(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
        """Computes eps with the latents padded to a multiple of savings.multiple by copies of the last."""
        padding = -len(x) % self.savings.multiple
        if padding == 0:
            return unet_eps(self.unet, x, step_t, cond, guided)
        rows = torch.arange(len(x) + padding, device=x.device).clamp(max=len(x) - 1)
        return unet_eps(self.unet, x[rows], step_t[rows], cond[rows], guided)[:, : len(x)]

    @contextmanager
    def sampling(self, cond: Conditioning, text_kv: bool) -> Iterator[Conditioning]:
        """Opens a context to sample latents of the prompts of `cond`: no gradients, at most unet_rows rows a forward.

        It yields the Conditioning to sample with. text_kv: keys and values of its text are computed here once, if the
        UNet's layers allow it; the policy's weights must then not change inside the context.
        """
        merged = merged_lora(self.unet) if self.savings.merge_lora and not self.is_reference else nullcontext()
        self.is_sampling = True
        try:
            with torch.no_grad(), merged:
                if not text_kv:
                    yield cond
                    return
                text = torch.cat([cond.null, cond.text])  # (1 + N, L, D)
                with cached_text(self.unet, text) as is_cached:
                    row = torch.arange(1, len(text), device=text.device)
                    yield replace(cond, row=row) if is_cached else cond
        finally:
            self.is_sampling = False

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Opens a context in which the policy is the frozen base model: adapters off, no gradients."""
        self.unet.disable_adapters()
        self.is_reference = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_reference = False
            self.unet.enable_adapters()

    @property
    def family(self) -> Family:
        """The base model's family, known by the UNet's configuration."""
        return family_of_unet(self.unet.config)

    def lora_state(self) -> dict[str, Tensor]:
        """Returns the LoRA's tensors under PEFT names."""
        return get_peft_model_state_dict(self.unet)

    def lora(self, facts: Mapping[str, str] | None = None) -> Lora:
        """Returns the LoRA as a file holds it; facts: entries of its header."""
        return Lora.of_state(self.lora_state(), self.rank, facts or {})

    def save_lora(self, folder: Path, facts: Mapping[str, str] | None = None) -> Path:
        """Writes folder/LORA_FILE, which `pipeline.load_lora_weights(folder)` opens."""
        return write(self.lora(facts), folder / LORA_FILE, "diffusers")

    def load_lora(self, path: Path) -> None:
        """Replaces the LoRA by that of a file or of a folder that `save_lora` wrote. Raises UserError as check_lora."""
        set_peft_model_state_dict(self.unet, self.check_lora(path).state())

    def check_lora(self, path: Path) -> Lora:
        """Reads a LoRA without loading it. Raises UserError if its layers, rank or scale differ from the policy's."""
        file = path / LORA_FILE if path.is_dir() else path
        lora = read(file)
        self._check(lora.state(), str(file))
        scaled_layers = [layer for layer, rank in lora.ranks.items() if lora.alpha[layer] != rank]
        if scaled_layers:
            layer = scaled_layers[0]
            raise UserError(
                f"{file} has alpha {lora.alpha[layer]:g} at rank {lora.ranks[layer]}, expected them equal; "
                "use a LoRA of scale 1, as strop trains it"
            )
        return lora

    def _check(self, state: dict[str, Tensor], source: str) -> None:
        expected_state = self.lora_state()
        differing_keys = sorted(expected_state.keys() ^ state.keys())
        if differing_keys:
            raise UserError(
                f"{source} does not fit the UNet with rank {self.rank}: it has {len(state) // 2} layers, expected the "
                f"{len(expected_state) // 2} of lora.target_modules, and differs in {differing_keys[0]}; "
                "use a LoRA of these layers"
            )
        misshapen_keys = [name for name, value in expected_state.items() if value.shape != state[name].shape]
        if not misshapen_keys:
            return
        name = misshapen_keys[0]
        shape, expected_shape = tuple(state[name].shape), tuple(expected_state[name].shape)
        rank = shape[0 if ".lora_A." in name else 1]
        if rank != self.rank:
            raise UserError(
                f"{source} has rank {rank}, expected rank {self.rank} (lora.rank) in {name}; "
                f"use a LoRA of rank {self.rank}, or lora.rank={rank}"
            )
        raise UserError(
            f"{source} is of another base model: {name} is {shape}, expected {expected_shape}; use one of this model"
        )


@dataclass(frozen=True, slots=True)
class TrainedLora:
    """The Trainable of a run that trains a policy's LoRA; its files' headers say which run wrote them."""

    policy: Policy
    config: Config
    keep = None  # all checkpoints stay: they are small

    def save(self, folder: Path, iteration: int) -> Path:
        """Writes folder/LORA_FILE and returns its path."""
        return self.policy.save_lora(folder, self.facts(iteration))

    def facts(self, iteration: int) -> dict[str, str]:
        """Returns the entries of a LoRA file's header after `iteration` iterations."""
        return facts(self.config, self.policy.family, iteration)

    def load(self, folder: Path) -> None:
        """Loads the LoRA of a folder. Raises UserError if it does not fit the policy."""
        self.policy.load_lora(folder)

    def check(self, folder: Path) -> None:
        """Raises UserError if the LoRA of a folder does not fit the policy; changes nothing."""
        self.policy.check_lora(folder)


def unet_eps(unet: UNet2DConditionModel, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool) -> Tensor:
    """Runs any UNet as Policy.eps does: one forward for both guidance halves, (2 or 1, N, C, H, W) in float32."""
    halves = 2 if guided else 1
    dtype = cond.text.dtype
    if cond.row is None:
        text = both_halves(cond.null, cond.text, guided)
    else:  # each row's text among the cached ones
        text = both_halves(torch.zeros_like(cond.row[:1]), cond.row, guided)
    added = None
    if cond.pooled is not None:
        time_ids = cond.time_ids.expand(len(text), -1)
        added = {"text_embeds": both_halves(cond.null_pooled, cond.pooled, guided), "time_ids": time_ids}
    rows = x.repeat(halves, 1, 1, 1).to(dtype)
    out = unet(rows, step_t.repeat(halves), encoder_hidden_states=text, added_cond_kwargs=added).sample
    return out.float().unflatten(0, (halves, len(x)))


def both_halves(null: Tensor, text: Tensor, guided: bool) -> Tensor:
    """Concatenates rows of the empty prompt and of the N prompts (2N, ...); only the latter (N, ...) if not guided."""
    return torch.cat([null.expand_as(text), text]) if guided else text
