"""A CLIP whose vision tower is modulated by the timestep through adaLN: the network inside the judge.

The text tower, the embeddings, the attention and the MLPs are those of transformers' CLIPModel; what lies between the
sub-layers (residual, gate, LayerNorm, shift, scale) runs on strop.kernels. Parameter names are those of the published
step-aware preference model. Nothing here knows of images, prompts or scores: judge/model.py does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from ...kernels import adaln_modulate, gated_residual_adaln

FREQUENCIES = 256
Modulation = list[tuple[Tensor, ...]]


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

    def __init__(self, clip: CLIPModel, modulated: bool = True):
        """Takes the modules of `clip`. modulated=False leaves it a plain CLIP that takes a timestep and ignores it."""
        super().__init__()
        width = clip.config.vision_config.hidden_size
        self.config: CLIPConfig = clip.config
        self.text_model = clip.text_model
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.modulated = modulated
        self._kept: dict[float, Modulation] | None = None  # by timestep; None: not frozen
        self._made_of: list[tuple[nn.Parameter, int]] = []  # what `_kept` was made of, with PyTorch's count of writes
        self._tower = self.tower
        if not modulated:
            return
        self.t_embedder = TimestepEmbedder(width)
        for layer in self.vision_model.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.vision_model.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to(dtype=clip.dtype, device=clip.device)

    def reset_modulation(self, rng: torch.Generator) -> None:
        """Identity modulation: weights 0, biases 0 except those of the gates, 1; t_embedder weights ~ N(0, 0.02)."""
        self._forget()
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

    def image_features(self, pixel_values: Tensor, t: Tensor | float) -> Tensor:
        """Normalised pixels (B, 3, H, W) and timesteps t (B,), or one for all rows -> projected features (B, E)."""
        if not self.modulated:
            return self._tower(pixel_values, None)
        return self._tower(pixel_values, self.modulation(t) if isinstance(t, Tensor) else self.modulation_at(t))

    def compile(self, **options: object) -> None:
        """As in nn.Module, of the image tower: from now on it runs through torch.compile."""
        self._tower = torch.compile(self.tower, **options)

    def tower(self, pixel_values: Tensor, made: Modulation | None) -> Tensor:
        """image_features under a modulation, each part (1, D) or (B, D); None is a plain CLIP."""
        vision = self.vision_model
        if made is None:
            return self.visual_projection(vision(pixel_values=pixel_values).pooler_output)
        layers = vision.encoder.layers
        modulation = [tuple(part.expand(len(pixel_values), -1) for part in parts) for parts in made]
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

    def modulation(self, t: Tensor) -> Modulation:
        """What t (B,) does to the vision tower: per layer (shift, scale, gate of attention, then of MLP), each (B, D).

        The last entry is (shift, scale) after the last layer.
        """
        embedding = self.t_embedder(t)
        chunks = [layer.adaLN_modulation(embedding).chunk(6, dim=-1) for layer in self.vision_model.encoder.layers]
        return [*chunks, self.vision_model.adaLN_modulation(embedding).chunk(2, dim=-1)]

    def modulation_at(self, t: float) -> Modulation:
        """`modulation` of one timestep, each (1, D); of a frozen network it is made once and kept (1 MB at full size).

        Under autocast it is made anew. Raises RuntimeError where the weights were written to since it was made.
        """
        modules = (*self.vision_model.encoder.layers, self.vision_model)
        weights = [*self.t_embedder.parameters(), *(w for m in modules for w in m.adaLN_modulation.parameters())]
        device = weights[0].device
        if self._kept is None or torch.is_autocast_enabled(device.type) or any(w.requires_grad for w in weights):
            return self.modulation(torch.full((1,), t, device=device))
        if not self._kept:
            self._made_of = [(w, w._version) for w in weights]
        if any(w is not own or w._version != writes for w, (own, writes) in zip(weights, self._made_of, strict=True)):
            raise RuntimeError("a judge's weights were changed while it was frozen; call unfreeze() before")
        if t not in self._kept:
            self._kept[t] = self.modulation(torch.full((1,), t, device=device))
        return self._kept[t]

    def freeze(self) -> TimeConditionedCLIP:
        """Says that the weights stay as they are: evaluation, no gradients, and what a timestep makes of them is kept.

        It lasts until `unfreeze`, which train() and requires_grad_(True) call. Loading other weights, and a move to
        another device or type, leave the network frozen and what was kept is made anew. Whoever writes to the weights
        in another way has to call `unfreeze` before.
        """
        self.eval().requires_grad_(False)
        self._kept, self._made_of = {}, []
        return self

    def unfreeze(self) -> None:
        """Keeps nothing any more; evaluation and gradients stay as they are."""
        self._kept, self._made_of = None, []

    def train(self, mode: bool = True) -> TimeConditionedCLIP:
        """As in nn.Module; a network in training is not frozen, nor is it afterwards."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> TimeConditionedCLIP:
        """As in nn.Module; a network with gradients is not frozen, nor is it afterwards."""
        if requires_grad:
            self.unfreeze()
        return super().requires_grad_(requires_grad)

    def _apply(self, *args, **kwargs) -> TimeConditionedCLIP:
        """nn.Module's way to another device or type, also as a part of a larger module."""
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        """nn.Module's way to other weights, also as a part of a larger module."""
        self._forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        """For copies and pickles: they are frozen as this one is, with nothing kept yet."""
        return self.__dict__ | {"_kept": None if self._kept is None else {}, "_made_of": []}

    def _forget(self) -> None:
        """What was kept is made anew when it is asked for, where the network is frozen."""
        self._made_of = []
        if self._kept:
            self._kept = {}
