"""A CLIP whose vision tower is modulated by the timestep through adaLN: the network inside the judge.

The text tower, the embeddings, the attention and the MLPs are those of transformers' CLIPModel; what lies between the
sub-layers (residual, gate, LayerNorm, shift, scale) runs on strop.kernels. Parameter names are those of the published
step-aware preference model. Nothing here knows of images, prompts or scores: preference.py does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from strop.kernels import adaln_modulate, gated_residual_adaln

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """Sinusoids of the raw timestep (cosines first) through a two-layer MLP, as in DiT."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) integer timesteps -> (B, width)."""
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies  # (B, half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class TimeConditionedCLIP(nn.Module):
    """CLIPModel plus t_embedder and one adaLN_modulation per vision layer and one after the last.

    A new one is bit for bit the CLIP it was made from at every timestep: modulation starts at shift 0, scale 0, gate 1.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        width = clip.config.vision_config.hidden_size
        self.config: CLIPConfig = clip.config
        self.text_model = clip.text_model
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.t_embedder = TimestepEmbedder(width)
        for layer in self.vision_model.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.vision_model.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to(dtype=clip.dtype, device=clip.device)

    def reset_modulation(self, rng: torch.Generator) -> None:
        """Identity modulation: weights 0, biases 0 except those of the gates, 1; t_embedder weights ~ N(0, 0.02)."""
        for module in (self.vision_model, *self.vision_model.encoder.layers):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        for layer in self.vision_model.encoder.layers:
            with torch.no_grad():
                bias = layer.adaLN_modulation[1].bias.view(6, -1)
                bias[2], bias[5] = 1, 1
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02, generator=rng)
            nn.init.zeros_(linear.bias)

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Token ids (N, L) -> projected features (N, E), not normalised."""
        return self.text_projection(self.text_model(input_ids=input_ids).pooler_output)

    def image_features(self, pixel_values: Tensor, t: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) and timesteps (B,), or (1,) for all rows -> projected features (B, E)."""
        vision = self.vision_model
        layers = vision.encoder.layers
        modulation = self._modulation(t, len(pixel_values))
        shift, scale, gate = modulation[0][:3]
        h = vision.pre_layrnorm(vision.embeddings(pixel_values))  # (B, L, D)
        norm = layers[0].layer_norm1
        y = adaln_modulate(h, norm.weight, norm.bias, shift, scale, norm.eps)
        for i, layer in enumerate(layers):
            shift_mlp, scale_mlp, gate_mlp = modulation[i][3:]
            branch, _ = layer.self_attn(hidden_states=y, attention_mask=None)
            norm = layer.layer_norm2
            h, y = gated_residual_adaln(h, branch, gate, norm.weight, norm.bias, shift_mlp, scale_mlp, norm.eps)
            branch = layer.mlp(y)
            if i + 1 < len(layers):
                norm = layers[i + 1].layer_norm1
                shift, scale, gate = modulation[i + 1][:3]
            else:  # only the class token goes on
                h, branch = h[:, :1], branch[:, :1]
                norm = vision.post_layernorm
                shift, scale = modulation[-1]
            h, y = gated_residual_adaln(h, branch, gate_mlp, norm.weight, norm.bias, shift, scale, norm.eps)
        return self.visual_projection(y[:, 0])

    def _modulation(self, t: Tensor, rows: int) -> list[tuple[Tensor, ...]]:
        """Per layer (shift, scale, gate of attention, then of MLP), last (shift, scale); each (rows, D)."""
        embedding = self.t_embedder(t)
        chunks = [layer.adaLN_modulation(embedding).chunk(6, dim=-1) for layer in self.vision_model.encoder.layers]
        chunks.append(self.vision_model.adaLN_modulation(embedding).chunk(2, dim=-1))
        return [tuple(part.expand(rows, -1) for part in parts) for parts in chunks]
