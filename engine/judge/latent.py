"""A judge that reads noisy latents: a UNet's encoder and the text encoders of a base model, trained on preferences.

It scores exp(logit_scale) cos(image, text). The image's features are the outputs of the UNet's down blocks, each before
its downsampler, and of its middle block, averaged over the latent and projected; the text's are the pooled output of
the text encoder. Neither a look ahead nor a decode is needed. Source: LPO (arXiv 2502.01051) and its released code.
A judge may also be a LoRA on the base model's own encoder, which then stays in memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..models.adapter import add_lora
from ..models.conditioning import Conditioning
from ..models.guided_unet import unet_inputs
from ..models.latent_diffusion import BATCH, LatentDiffusion, text_outputs
from .candidates import Candidates

PARTS = ("unet", "encoders")  # of LatentNetwork; its other parameters are projections and scale
DECODER = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")  # of a UNet
LEAST_T = 1  # the smallest timestep that LPO's judges have seen; clean latents are scored there
LORA_LAYERS = r".*(to_[qkv]|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|conv_shortcut|time_emb_proj)"


class LatentNetwork(nn.Module):
    """The networks of the judge: UNet without its decoder, text encoders, projections, and the logit scale."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoders: Sequence[nn.Module],
        visual_projection: Tensor,
        text_projection: Tensor | None,
        logit_scale: Tensor,
    ):
        """Takes the projections (E, F) of pooled features and (E, P) of pooled text, None where the encoder has it."""
        super().__init__()
        self.unet = without_decoder(unet)
        self.encoders = nn.ModuleList(encoders)
        self.visual_projection = nn.Parameter(visual_projection.float())
        self.text_projection = None if text_projection is None else nn.Parameter(text_projection.float())
        self.logit_scale = nn.Parameter(logit_scale.float())
        self.lora_rank: int | None = None
        self._outputs = encoder_outputs

    def compile(self, **options: object) -> None:
        """Compiles the UNet's encoder with torch.compile, as nn.Module.compile does for a whole module."""
        self._outputs = torch.compile(encoder_outputs, **options)

    def add_lora(self, rank: int, seed: int) -> None:
        """Adds a fresh LoRA to all layers of the UNet's blocks, as models/adapter.py does."""
        add_lora(self.unet, rank, LORA_LAYERS, seed)
        self.lora_rank = rank

    def own(self) -> dict[str, Tensor]:
        """Returns by name the parameters that are not the base model's: all, or of a LoRA itself and projections."""
        of_judge = lambda name: not self.lora_rank or "lora_" in name or name.partition(".")[0] not in PARTS
        return {name: value for name, value in self.named_parameters() if of_judge(name)}

    def image_features(self, x: Tensor, t: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        """Computes features (N, E) of latents x (N, C, h, w) at timesteps t (N,), with the text of cond's N prompts.

        guidance: scale of the middle block's feature, as of a prediction; 1 leaves out the half without the prompt.
        """
        guided = guidance != 1
        outputs = self._outputs(self.unet, *unet_inputs(x, t, cond, guided))
        *down, middle = (output.float().mean((2, 3)).unflatten(0, (-1, len(x))) for output in outputs)
        if guided:
            middle = middle[:1] + guidance * (middle[1:] - middle[:1])
        if self.visual_projection.shape[1] != middle.shape[-1]:  # all scales
            middle = torch.cat([*(each[-1:] for each in down), middle], dim=-1)
        return F.linear(middle[0], self.visual_projection)

    def text_features(self, pooled: Tensor) -> Tensor:
        """Projects pooled text (N, P) to features (N, E)."""
        return pooled.float() if self.text_projection is None else F.linear(pooled.float(), self.text_projection)


def feature_width(unet: UNet2DConditionModel) -> int:
    """Returns how many numbers the pooled features of all of a UNet's down blocks and its middle block are."""
    blocks = unet.config.block_out_channels
    return sum(blocks) + blocks[-1]


def without_decoder(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Removes in place what a UNet has after its middle block, and returns it."""
    for part in DECODER:
        if hasattr(unet, part):
            delattr(unet, part)
    return unet


def encoder_outputs(
    unet: UNet2DConditionModel, x: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor] | None
) -> list[Tensor]:
    """Runs a UNet's encoder; returns the last layer of every down block (N, c, h, w), and of the middle block."""
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
    size = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = emb if size is None else emb + size
    x, outputs = unet.conv_in(x), []
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, residuals = block(hidden_states=x, temb=emb, **attends)
        outputs.append(residuals[len(block.resnets) - 1])
    return [*outputs, unet.mid_block(x, emb, encoder_hidden_states=text)]


class LatentJudge:
    """Scores noisy latents against prompts with a LatentNetwork; `encode` packs all that it needs of a prompt."""

    kind = "latent"

    def __init__(self, network: LatentNetwork, diffusion: LatentDiffusion, guidance: float, t_of_step: bool):
        """Freezes the network. diffusion: the base model, whose tokenizers and VAE it uses.

        guidance: as in LatentNetwork. t_of_step: whether candidates are scored at the timestep from which their step
        was drawn, as published, or at their own.
        """
        self.network = network.eval().requires_grad_(False)
        self.diffusion, self.guidance, self.t_of_step = diffusion, guidance, t_of_step
        self.device, self.family = diffusion.device, diffusion.family
        self.width = len(network.visual_projection)
        self._null: Conditioning | None = None

    @property
    def text_networks(self) -> list[nn.Module]:
        """The networks that only `encode` needs."""
        return list(self.network.encoders)

    def unfreeze(self) -> None:
        """Makes the judge ready for training: all that its scores depend on, or of one with a LoRA that alone.

        The projections and the logit scale are trained in both cases; a LoRA leaves the text encoders as they are.
        """
        self.network.train()
        trained = [value for name, value in self.network.own().items() if not name.startswith("encoders.")]
        if not self.network.lora_rank:
            encoders = self.network.encoders.requires_grad_(True)
            text = self._read([""])
            outputs = text.text.sum() + text.judge.sum() + (0 if text.pooled is None else text.pooled.sum())
            weights = list(encoders.parameters())
            grads = torch.autograd.grad(outputs, weights, allow_unused=True)  # the last layer may have no part in them
            encoders.requires_grad_(False)
            trained += [value for value, grad in zip(weights, grads, strict=True) if grad is not None]
        for value in trained:
            value.requires_grad_(True)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Packs features, hidden states and pooled text of N prompts into a row each (N, ...), for Conditioning.judge.

        Raises RuntimeError after release_text_tower.
        """
        if not len(self.network.encoders):
            raise RuntimeError("a judge without its text encoders cannot be asked for text features")
        if self._null is None or self.network.training:
            null = self._read([""])
            self._null = replace(null, time_ids=self.diffusion.time_ids(null.text.dtype))  # once, not at every score
        parts = [self._read(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        return torch.cat([pack(part) for part in parts])

    def release_text_tower(self) -> None:
        """Frees the text encoders' memory; `encode` then raises RuntimeError."""
        self.network.encoders = nn.ModuleList()

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Scores the latents of K branches of B prompts as they are: (K, B); cond: the Conditioning of the prompts."""
        return self.score_latents(candidates.x, cond.judge, candidates.drawn_at if self.t_of_step else candidates.t)

    def score_images(self, images: Tensor, text: Tensor, t: float) -> Tensor:
        """Scores images (K, B, 3, H, W) in [-1, 1] by their latents for packed text (B, ...) at timestep t: (K, B)."""
        mean, _ = self.diffusion.posterior(images)
        return self.score_latents(mean * self.diffusion.vae.config.scaling_factor, text, t)

    @torch.no_grad()
    def score_latents(self, latents: Tensor, text: Tensor, t: float) -> Tensor:
        """Scores latents (K, B, C, h, w) for packed text (B, ...) at timestep t: (K, B)."""
        flat = latents.flatten(0, 1)
        steps = torch.full((len(flat),), t, device=flat.device)
        return self.compare(flat, text.repeat(len(latents), 1), steps).view(latents.shape[:2])

    def compare(self, latents: Tensor, text: Tensor, t: Tensor) -> Tensor:
        """Scores latents (N, C, h, w) for packed text (N, ...) at timesteps t (N,), with gradients: (N,)."""
        cond = self._unpacked(text)
        image = self.network.image_features(latents, t.clamp(min=LEAST_T), cond, self.guidance)
        cosine = (F.normalize(image, dim=-1) * F.normalize(cond.judge, dim=-1)).sum(-1)
        return self.network.logit_scale.exp() * cosine

    def _read(self, prompts: Sequence[str]) -> Conditioning:
        """Returns hidden states as text, pooled text where the UNet takes it, and text features as judge."""
        outputs = text_outputs(self.diffusion.tokenizers, self.network.encoders, prompts, self.device)
        text, pooled = self.family.states(outputs)
        features = self.network.text_features(self.family.pooled(outputs))
        return Conditioning(text, text[:0], judge=features, pooled=pooled)

    def _unpacked(self, rows: Tensor) -> Conditioning:
        """Returns the Conditioning of packed rows (N, ...), with the empty prompt's."""
        null, dtype = self._null, self._null.text.dtype
        width, length = self.width, null.text[0].numel()
        features, text, pooled = rows.split([width, length, rows.shape[1] - width - length], dim=1)
        cond = Conditioning(text.unflatten(1, null.text.shape[1:]).to(dtype), null.text, judge=features.float())
        if null.pooled is None:
            return cond
        return replace(cond, pooled=pooled.to(dtype), null_pooled=null.pooled, time_ids=null.time_ids)


def pack(cond: Conditioning) -> Tensor:
    """Packs text features, hidden states and, where there is, pooled text of N prompts into a row each (N, ...)."""
    parts = [cond.judge, cond.text.flatten(1)] + ([] if cond.pooled is None else [cond.pooled])
    return torch.cat([part.to(cond.text.dtype) for part in parts], dim=1)
