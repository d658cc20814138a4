"""What strop asks of a family of base models: all that tells SD-1.5 from SDXL, one file a family.

A family knows configurations and tensors, and imports neither diffusers nor transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Family(ABC):
    """A family of base models: one architecture, of which there are many fine-tunes.

    name: in files that strop writes; title: in messages.
    original: the hub id of the first model; name_signs: pieces, in lower case, by which names of models tell of it.
    architecture: the original's configuration files by part: model_index, unet, vae, each text encoder, scheduler.
    text_encoders: by part, which class of transformers it is; in the order in which `states` takes their outputs.
    prefixes: by part, how the names of its tensors begin in a checkpoint of the original code; lookalikes: by such a
    beginning that none of the family's has, what kind of model has it.
    lora_header: entries of a LoRA's header by which user interfaces know the family.
    published_rollout: what the authors' code sets for this family, by key of section `rollout`.
    """

    name: str
    title: str
    original: str
    name_signs: tuple[str, ...]
    architecture: dict[str, dict]
    text_encoders: dict[str, str]
    prefixes: dict[str, str]
    lookalikes: dict[str, str]
    lora_header: dict[str, str]
    published_rollout: dict[str, int | bool]

    @property
    def pipeline(self) -> str:
        """The pipeline's class in diffusers."""
        return self.architecture["model_index"]["_class_name"]

    @property
    def size(self) -> int:
        """Pixels of a side of the images that the original was trained on."""
        return self.architecture["vae"]["sample_size"]

    def vae_dtype(self, vae: Mapping, dtype: torch.dtype) -> torch.dtype:
        """In which type a VAE of this configuration is loaded where `dtype` is asked for."""
        return torch.float32 if dtype == torch.float16 and self.overflows(vae) else dtype

    @abstractmethod
    def takes(self, unet: Mapping) -> bool:
        """Whether a UNet of this configuration has the family's inputs."""

    @abstractmethod
    def lookalike(self, unet: Mapping, parts: Collection[str]) -> str | None:
        """What a model is that is of another kind although `takes` is true of its UNet; None of the family's own.

        parts: those of `text_encoders` that the model has.
        """

    @abstractmethod
    def unlike_text(self, unet: Mapping, text: Mapping[str, Mapping]) -> str | None:
        """What a model is whose text encoders are not those that its UNet asks for; None where they are.

        text: their configurations by part.
        """

    @abstractmethod
    def states(self, outputs: Sequence) -> tuple[Tensor, Tensor | None]:
        """Hidden states (N, L, D) of N prompts as the UNet takes them and, where it takes it, pooled text (N, P).

        outputs: of transformers' text encoders, with hidden states.
        """

    @abstractmethod
    def pooled_width(self, unet: Mapping) -> int | None:
        """P of the pooled text that a UNet of this configuration takes; None where it takes none."""

    @abstractmethod
    def time_ids(self, height: int, width: int) -> list[int] | None:
        """What the UNet is told of an image of so many pixels beside its text; None where it is told nothing."""

    @abstractmethod
    def zero_null(self, model_index: Mapping) -> bool:
        """Whether the empty prompt is all zeros instead of its encoding, for a model of this model_index.json."""

    @abstractmethod
    def overflows(self, vae: Mapping) -> bool:
        """Whether a VAE of this configuration overflows in float16."""
