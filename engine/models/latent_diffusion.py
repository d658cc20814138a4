"""Runs the frozen parts of a latent diffusion model around its UNet: text encoders, VAE and noise schedule.

families/ says how each family of base models uses them, base_model.py finds and loads them. The UNet is in
guided_unet.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from ..config.training import ModelConfig
from ..errors import warn
from ..schedules.ddim import ddim_schedule
from ..schedules.schedule import Schedule
from .base_model import BaseModel, dtype_on
from .conditioning import Conditioning
from .families.base import Family

BATCH = 64  # prompts per forward of the text encoders; `encode` may get thousands


@dataclass(frozen=True, slots=True)
class TextEncoding:
    """Text encoders with a tokenizer each; zero_null: the empty prompt's embedding is all zeros."""

    tokenizers: Sequence[CLIPTokenizer] = ()
    encoders: Sequence[torch.nn.Module] = ()
    zero_null: bool = False


class LatentDiffusion:
    """Text encoders, VAE and noise schedule of a base model, all frozen.

    latent_shape: (C, h, w) of one latent; factor: image pixels per latent pixel along a side.
    """

    def __init__(
        self,
        family: Family,
        text: TextEncoding,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        latent_shape: tuple[int, int, int],
        decode_rows: int | None = None,
    ):
        """Freezes the parts. decode_rows: how many latents are decoded at once; None means all."""
        self.family = family
        self.tokenizers = list(text.tokenizers)
        self.text_encoders = [encoder.eval().requires_grad_(False) for encoder in text.encoders]
        self.vae = vae.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.latent_shape = latent_shape
        self.factor = pixels_per_latent(vae)
        self.zero_null = text.zero_null
        self.decode_rows = decode_rows
        self.device = next(vae.parameters()).device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return tuple(side * self.factor for side in self.latent_shape[1:])

    @classmethod
    def load(cls, model: ModelConfig, device: torch.device) -> LatentDiffusion:
        """Loads the model of section `model`. Raises UserError if a part is missing or of another kind."""
        base, dtype = BaseModel.find(model), dtype_on(device, model.dtype, "model.dtype")
        tokenizers, scheduler, vae = base.tokenizers(), base.scheduler(), base.vae(dtype)
        latent_shape = base.latent_shape(pixels_per_latent(vae))
        encoders = [encoder.to(device) for encoder in base.text_encoders(dtype)]
        text = TextEncoding(tokenizers, encoders, base.zero_null())
        return cls(base.family, text, vae.to(device), scheduler, latent_shape, model.decode_rows)

    def schedule(self, num_steps: int, eta: float, guidance: float) -> Schedule:
        """Builds the DDIM schedule of this base model; the sampler that its files name is ignored."""
        return ddim_schedule(self.scheduler, num_steps, eta, guidance, self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], onto: torch.device | None = None) -> Conditioning:
        """Encodes the prompts and the empty prompt (the negative one) on the device.

        The family says which hidden states are used. Over-long prompts are truncated by the tokenizer, with one
        warning. onto: a device to which the embeddings are moved batch by batch, because those of thousands of prompts
        take gigabytes. Raises RuntimeError after release_text_encoders.
        """
        if not self.text_encoders:
            raise RuntimeError("the text encoders have been released: encode all prompts before")
        self._warn_of_truncation(prompts)
        batches = [self._encode_batch(prompts[i : i + BATCH], onto) for i in range(0, len(prompts), BATCH)]
        text, pooled = (torch.cat(column) if column[0] is not None else None for column in zip(*batches, strict=True))
        if self.zero_null:
            null, null_pooled = (None if value is None else torch.zeros_like(value[:1]) for value in (text, pooled))
        else:
            null, null_pooled = self._encode_batch([""], onto)
        return Conditioning(text, null, None, pooled, null_pooled, self.time_ids(text.dtype))

    def time_ids(self, dtype: torch.dtype) -> Tensor | None:
        """Returns the sizes that the UNet takes besides the text, (1, 6) on the device, or None."""
        sizes = self.family.time_ids(*self.image_size)
        return None if sizes is None else torch.tensor([sizes], dtype=dtype, device=self.device)

    def release_text_encoders(self) -> None:
        """Frees the text encoders and their memory; `encode` then raises RuntimeError."""
        self.text_encoders = []

    def release_encoders(self) -> None:
        """Removes text encoders and the VAE's encoder from the device; for when all their results are in the cache."""
        self.release_text_encoders()
        self.vae.encoder.to("cpu")

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images (2, N, 3, H, W): mean and std (2, N, C, h, w) of the VAE's latents, not scaled.

        The VAE encodes one image of each pair after the other, which halves its memory.
        """
        self.vae.encoder.to(self.device)  # from where release_encoders may have moved it
        sides = [self.vae.encode(side.to(self.vae.dtype)).latent_dist for side in images]
        return torch.stack([side.mean for side in sides]), torch.stack([side.std for side in sides])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (..., C, h, w) to images (..., 3, H, W) of the VAE's type, about [-1, 1] and not clamped."""
        return decode_in_parts(self.vae, latents.to(self.vae.dtype) / self.vae.config.scaling_factor, self.decode_rows)

    def _encode_batch(self, prompts: Sequence[str], onto: torch.device | None) -> tuple[Tensor, Tensor | None]:
        """Returns hidden states (N, L, D) of N prompts and their pooled text (N, P), None if the UNet takes none."""
        text, pooled = self.family.states(text_outputs(self.tokenizers, self.text_encoders, prompts, self.device))
        return text.to(onto), None if pooled is None else pooled.to(onto)

    def _warn_of_truncation(self, prompts: Sequence[str]) -> None:
        tokenizer = self.tokenizers[0]
        limit = tokenizer.model_max_length
        lengths = map(len, tokenizer(list(prompts), verbose=False).input_ids)
        truncated = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
        if truncated:
            warn(
                f"{len(truncated)} of {len(prompts)} prompts have more than {limit} tokens, and what is past them "
                f"is not read, as in {shorten(truncated[0], 100, placeholder=' ...')!r}"
            )


def text_outputs(
    tokenizers: Sequence[CLIPTokenizer],
    encoders: Sequence[torch.nn.Module],
    prompts: Sequence[str],
    device: torch.device,
) -> list:
    """Returns what each text encoder makes of the prompts: the outputs of transformers, with hidden states."""
    outputs = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        outputs.append(encoder(ids.to(device), output_hidden_states=True))
    return outputs


def decode_in_parts(decoder: AutoencoderKL | AutoencoderTiny, latents: Tensor, rows: int | None) -> Tensor:
    """Decodes latents (..., C, h, w) to images (..., 3, H, W), at most `rows` at once; None means all."""
    flat = latents.flatten(0, -4)
    parts = [decoder.decode(part).sample for part in flat.split(rows or len(flat))]
    images = parts[0] if len(parts) == 1 else torch.cat(parts)
    return images.unflatten(0, latents.shape[:-3])


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Returns the image pixels per latent pixel along a side, which are 8 in the full-size models."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
