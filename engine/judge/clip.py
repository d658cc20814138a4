"""The judge's network: a CLIP whose vision tower is modulated by the timestep through adaLN.

Text tower, embeddings, attention and MLPs are those of transformers' CLIPModel; the operations between sub-layers
(residual, gate, LayerNorm, shift, scale) run on strop.kernels. Parameter names are those of the published step-aware
preference model. Images, prompts and scores are handled in judge/model.py.
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
    """Embeds a timestep as DiT does: sinusoids of the raw timestep, cosines first, go through a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embeds integer timesteps t (B,) to (B, width)."""
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies  # (B, half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class TimeConditionedCLIP(nn.Module):
    """A CLIPModel with a t_embedder, one adaLN_modulation per vision layer and one after the last layer.

    After reset_modulation (shift 0, scale 0, gate 1) it is bit for bit the CLIP it was made from, at every timestep.
    """

    def __init__(self, clip: CLIPModel, modulated: bool = True):
        """Takes over the modules of `clip`. modulated=False makes it a plain CLIP that ignores the timestep."""
        super().__init__()
        width = clip.config.vision_config.hidden_size
        self.config: CLIPConfig = clip.config
        self.text_model = clip.text_model
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.modulated = modulated
        self._cache: dict[float, Modulation] | None = None  # by timestep; None: not frozen
        self._cache_source: list[tuple[nn.Parameter, int]] = []  # weights behind `_cache`, with their write counts
        self._tower = self.tower
        if not modulated:
            return
        self.t_embedder = TimestepEmbedder(width)
        for layer in self.vision_model.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.vision_model.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.to(dtype=clip.dtype, device=clip.device)

    def reset_modulation(self, rng: torch.Generator) -> None:
        """Sets identity modulation: weights 0, gate biases 1, other biases 0; t_embedder weights ~ N(0, 0.02)."""
        self._empty_cache()
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

    def cast(self, dtype: torch.dtype) -> TimeConditionedCLIP:
        """Casts all weights but the logit scale, which rounding would change by percents."""
        scale = self.logit_scale.data
        self.to(dtype).logit_scale.data = scale
        return self

    def text_features(self, input_ids: Tensor) -> Tensor:
        """Projects token ids (N, L) to text features (N, E), not normalised."""
        return self.text_projection(self.text_model(input_ids=input_ids).pooler_output)

    def image_features(self, pixel_values: Tensor, t: Tensor | float) -> Tensor:
        """Projects normalised pixels (B, 3, H, W) at timesteps t, (B,) or one for all rows, to features (B, E)."""
        if not self.modulated:
            return self._tower(pixel_values, None)
        return self._tower(pixel_values, self.modulation(t) if isinstance(t, Tensor) else self.modulation_at(t))

    def compile(self, **options: object) -> None:
        """Compiles the image tower with torch.compile, as nn.Module.compile does for a whole module."""
        self._tower = torch.compile(self.tower, **options)

    def tower(self, pixel_values: Tensor, modulation: Modulation | None) -> Tensor:
        """Computes image features with a modulation whose parts are (1, D) or (B, D); None means a plain CLIP."""
        vision = self.vision_model
        if modulation is None:
            return self.visual_projection(vision(pixel_values=pixel_values).pooler_output)
        layers = vision.encoder.layers
        modulation = [tuple(part.expand(len(pixel_values), -1) for part in parts) for parts in modulation]
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
        """Computes the modulation at t (B,): per layer (shift, scale, gate of attention, then of MLP), each (B, D).

        The last entry is (shift, scale) after the last layer.
        """
        embedding = self.t_embedder(t)
        chunks = [layer.adaLN_modulation(embedding).chunk(6, dim=-1) for layer in self.vision_model.encoder.layers]
        return [*chunks, self.vision_model.adaLN_modulation(embedding).chunk(2, dim=-1)]

    def modulation_at(self, t: float) -> Modulation:
        """Returns the modulation at one timestep, each part (1, D); a frozen network caches it (1 MB at full size).

        Under autocast it is computed anew. Raises RuntimeError if the weights were written to since it was cached.
        """
        modules = (*self.vision_model.encoder.layers, self.vision_model)
        weights = [*self.t_embedder.parameters(), *(w for m in modules for w in m.adaLN_modulation.parameters())]
        device = weights[0].device
        if self._cache is None or torch.is_autocast_enabled(device.type) or any(w.requires_grad for w in weights):
            return self.modulation(torch.full((1,), t, device=device))
        if not self._cache:
            self._cache_source = [(w, w._version) for w in weights]
        if any(w is not old or w._version != n for w, (old, n) in zip(weights, self._cache_source, strict=True)):
            raise RuntimeError("a judge's weights were changed while it was frozen; call unfreeze() before")
        if t not in self._cache:
            self._cache[t] = self.modulation(torch.full((1,), t, device=device))
        return self._cache[t]

    def freeze(self) -> TimeConditionedCLIP:
        """Puts the network in evaluation mode without gradients and caches the modulation of each timestep.

        This lasts until `unfreeze`, which train() and requires_grad_(True) call. Loading other weights or moving the
        network to another device or type leaves it frozen and empties the cache. Call `unfreeze` before writing to the
        weights in any other way.
        """
        self.eval().requires_grad_(False)
        self._cache, self._cache_source = {}, []
        return self

    def unfreeze(self) -> None:
        """Stops caching; evaluation mode and gradients stay as they are."""
        self._cache, self._cache_source = None, []

    def train(self, mode: bool = True) -> TimeConditionedCLIP:
        """Sets the mode as nn.Module does; training mode ends `freeze` for good."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> TimeConditionedCLIP:
        """Sets requires_grad as nn.Module does; gradients end `freeze` for good."""
        if requires_grad:
            self.unfreeze()
        return super().requires_grad_(requires_grad)

    def _apply(self, *args, **kwargs) -> TimeConditionedCLIP:
        """Empties the cache when nn.Module moves the network, also within a larger module, to a device or type."""
        self._empty_cache()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        """Empties the cache when nn.Module loads weights, also within a larger module."""
        self._empty_cache()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        """Returns the state of copies and pickles, which are frozen as this network is and have an empty cache."""
        return self.__dict__ | {"_cache": None if self._cache is None else {}, "_cache_source": []}

    def _empty_cache(self) -> None:
        """Empties the cache; a frozen network fills it again when it is used."""
        self._cache_source = []
        if self._cache:
            self._cache = {}
