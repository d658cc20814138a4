"""Decodes latents for the judge with an AutoencoderTiny (TAESD), at about a tenth of the cost of the VAE.

Only rollouts use it, if rollout.decoder names one; the VAE decodes evaluation images and all that a person sees.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ..errors import UserError
from .base_model import DTYPES, load_network
from .families.shared import CHANNELS
from .hub import fetch
from .latent_diffusion import LatentDiffusion, decode_in_parts
from .model_files import read_config


class TinyDecoder:
    """A frozen AutoencoderTiny with the `decode` of LatentDiffusion."""

    def __init__(self, network: AutoencoderTiny, decode_rows: int | None = None):
        """Freezes the network. decode_rows: how many latents are decoded at once; None means all."""
        self.network = network.eval().requires_grad_(False)
        self.decode_rows = decode_rows

    @classmethod
    def load(cls, path: str, dtype: str, diffusion: LatentDiffusion) -> TinyDecoder:
        """Loads the network of a folder or hub id in `dtype`, on the device of the base model `diffusion`.

        Raises UserError if it is another kind of network or makes images of another size than the model's VAE.
        """
        folder = fetch(path, None, "rollout.decoder", ("config.json",))
        if not folder.is_dir():
            raise UserError(f"rollout.decoder: found the file {path}, expected the folder of an AutoencoderTiny")
        config = read_config(folder, "", "rollout.decoder")
        kind, channels = config.get("_class_name"), config.get("latent_channels", CHANNELS)
        stages = len(config.get("decoder_block_out_channels", range(4)))
        factor = config.get("upsampling_scaling_factor", 2) ** (stages - 1)
        if (kind, channels, factor) != ("AutoencoderTiny", CHANNELS, diffusion.factor):
            raise UserError(
                f"rollout.decoder: found {path} of kind {kind} with {channels} latent channels and {factor} pixels "
                f"to a latent's side, expected an AutoencoderTiny with {CHANNELS} and {diffusion.factor}"
            )
        network = load_network(AutoencoderTiny, path, None, "", DTYPES[dtype], "rollout.decoder")
        return cls(network.to(diffusion.device), diffusion.decode_rows)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (..., C, h, w) as the UNet sees them to images (..., 3, H, W) of its type, about [-1, 1].

        An AutoencoderTiny takes scaled latents: they are not divided by the VAE's scaling factor.
        """
        return decode_in_parts(self.network, latents.to(self.network.dtype), self.decode_rows)


def load_decoder(path: str | None, dtype: str, diffusion: LatentDiffusion) -> TinyDecoder | LatentDiffusion:
    """Loads the decoder of a rollout: the TinyDecoder of `path`, or where that is None the model's own VAE."""
    return TinyDecoder.load(path, dtype, diffusion) if path else diffusion
