"""The interface of a family of base models: each family has one file with all that tells it from the others.

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

    name: its name in files that strop writes; title: its name in messages.
    original: the hub id of the first model; name_signs: lower-case substrings of model names that hint at the family.
    architecture: the original's configuration files by part: model_index, unet, vae, each text encoder, scheduler.
    text_encoders: the transformers class of each text encoder, in the order in which `states` takes their outputs.
    prefixes: the prefix of each part's tensor names in a checkpoint of the original code; lookalikes: prefixes that
    only another kind of model has, and the name of that kind.
    lora_header: entries of a LoRA's header by which user interfaces recognise the family.
    published_rollout: values of the authors' code for this family, by key of section `rollout`.
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
        """The name of the pipeline's class in diffusers."""
        return self.architecture["model_index"]["_class_name"]

    @property
    def size(self) -> int:
        """The side, in pixels, of the images that the original was trained on."""
        return self.architecture["vae"]["sample_size"]

    def vae_dtype(self, vae: Mapping, dtype: torch.dtype) -> torch.dtype:
        """Returns the type in which a VAE of this configuration is loaded if `dtype` is asked for."""
        return torch.float32 if dtype == torch.float16 and self.overflows(vae) else dtype

    @abstractmethod
    def takes(self, unet: Mapping) -> bool:
        """Whether a UNet of this configuration has the family's inputs."""

    @abstractmethod
    def lookalike(self, unet: Mapping, parts: Collection[str]) -> str | None:
        """Names the kind of a model of another family whose UNet `takes` accepts; None if it is of this family.

        parts: which of `text_encoders` the model has.
        """

    @abstractmethod
    def unlike_text(self, unet: Mapping, text: Mapping[str, Mapping]) -> str | None:
        """Describes a model whose text encoders do not fit its UNet; None if they fit.

        text: the text encoders' configurations by part.
        """

    @abstractmethod
    def states(self, outputs: Sequence) -> tuple[Tensor, Tensor | None]:
        """Returns hidden states (N, L, D) of N prompts as the UNet takes them and pooled text (N, P) or None.

        outputs: the outputs of the transformers text encoders, with hidden states.
        """

    @abstractmethod
    def pooled(self, outputs: Sequence) -> Tensor:
        """Returns one vector for each of N prompts (N, P), by the outputs of the text encoders as in `states`."""

    @abstractmethod
    def pooled_width(self, unet: Mapping) -> int | None:
        """Returns the width P of the pooled text that a UNet of this configuration takes; None if it takes none."""

    @abstractmethod
    def time_ids(self, height: int, width: int) -> list[int] | None:
        """Returns the sizes that the UNet takes besides the text, for an image of height x width pixels, or None."""

    @abstractmethod
    def zero_null(self, model_index: Mapping) -> bool:
        """Whether the empty prompt's embedding is all zeros instead of its encoding, by a model's model_index.json."""

    @abstractmethod
    def overflows(self, vae: Mapping) -> bool:
        """Whether a VAE of this configuration overflows in float16."""
