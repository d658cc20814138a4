"""The policy is a UNet with a LoRA; with the LoRA switched off it is the reference, so no second UNet is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..config.training import Config
from ..errors import UserError
from ..speed.merged_lora import merged_lora, switch
from .adapter import add_lora, lora_state, set_lora_state
from .guided_unet import NO_SAVINGS, GuidedUNet, Savings
from .lora_file import LORA_FILE, Lora, facts, read, write


class Policy(GuidedUNet):
    """UNet2DConditionModel with a LoRA on its attention layers; only the LoRA has gradients, in float32."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        rank: int,
        target_modules: tuple[str, ...],
        seed: int,
        latent_shape: tuple[int, int, int] | None = None,
        savings: Savings = NO_SAVINGS,
    ):
        """Adds a fresh LoRA: A ~ N(0, 1/rank^2) from `seed`, B = 0, alpha = rank: policy and reference start equal.

        latent_shape: (C, h, w) of a latent; None means the UNet's default resolution. Raises UserError where no layer
        is of target_modules, and for a version of PEFT whose layers have another switch.
        """
        super().__init__(unet, latent_shape, savings)
        self.rank = rank
        self.is_reference = False
        try:
            add_lora(self.unet, rank, target_modules, seed)
        except ValueError as error:
            raise UserError(f"lora.target_modules: found {list(target_modules)}; {error}") from None
        cast_training_params(self.unet, torch.float32)
        self._lora_layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        with self.reference():
            if not all(layer.disable_adapters for layer in self._lora_layers):
                raise UserError(
                    "peft: this version switches a LoRA off in another way; install that of constraints.txt"
                )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, which are those of the LoRA."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def _merged(self) -> AbstractContextManager:
        """Opens a context in which the LoRA is merged into the weights, if it is on and the savings ask for it."""
        return merged_lora(self.unet) if self.savings.merge_lora and not self.is_reference else nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Opens a context in which the policy is the frozen base model: adapters off, no gradients."""
        switch(self._lora_layers, False)
        self.is_reference = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_reference = False
            switch(self._lora_layers, True)

    def lora_state(self) -> dict[str, Tensor]:
        """Returns the LoRA's tensors under PEFT names."""
        return lora_state(self.unet)

    def lora(self, facts: Mapping[str, str] | None = None) -> Lora:
        """Returns the LoRA as a file holds it; facts: entries of its header."""
        return Lora.of_state(self.lora_state(), self.rank, facts or {})

    def save_lora(self, folder: Path, facts: Mapping[str, str] | None = None) -> Path:
        """Writes folder/LORA_FILE, which `pipeline.load_lora_weights(folder)` opens."""
        return write(self.lora(facts), folder / LORA_FILE, "diffusers")

    def load_lora(self, path: Path) -> None:
        """Replaces the LoRA by that of a file or of a folder that `save_lora` wrote. Raises UserError as check_lora."""
        set_lora_state(self.unet, self.check_lora(path).state())

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

    def save(self, folder: Path, iteration: int) -> Path:
        """Writes folder/LORA_FILE and returns its path."""
        return self.policy.save_lora(folder, self.facts(iteration))

    def facts(self, iteration: int) -> dict[str, str]:
        """Returns the entries of a LoRA file's header after `iteration` iterations."""
        return facts(self.config, self.policy.family, iteration)

    def load(self, folder: Path) -> None:
        """Loads the LoRA of a folder. Raises UserError if it does not fit the policy."""
        self.policy.load_lora(folder)


class Companion(Protocol):
    """What changes beside a LoRA while it is trained, and hence lies in checkpoints beside it."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class LoraAnd:
    """The Trainable of a method that trains a policy's LoRA and keeps a companion."""

    lora: TrainedLora
    companion: Companion

    def save(self, folder: Path, iteration: int) -> None:
        """Writes the LoRA and the companion's file."""
        self.lora.save(folder, iteration)
        self.companion.save(folder)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises UserError if the LoRA does not fit the policy."""
        self.lora.load(folder)
        self.companion.load(folder)
