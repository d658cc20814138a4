"""SDXL has two text encoders side by side, and a UNet that also takes the pooled text and the image's size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .base import Family
from .shared import CLIP_L, NOISE, TEXT_DEFAULT, UNET_PREFIX, VAE, VAE_PREFIX, unlike_clip

TIME_IDS = 6  # original size, crop, target size
ARCHITECTURE = {
    "model_index": {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "center_input_sample": False,
        "class_embed_type": None,
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
    "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_L
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "scheduler": NOISE
    | {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}


class StableDiffusionXL(Family):
    """Stable Diffusion XL, its base model, and fine-tunes of it."""

    def takes(self, unet: Mapping) -> bool:
        return unet.get("addition_embed_type") == "text_time"

    def lookalike(self, unet: Mapping, parts: Collection[str]) -> str | None:
        return "an SDXL refiner (it has no text_encoder/)" if set(parts) == {"text_encoder_2"} else None

    def unlike_text(self, unet: Mapping, text: Mapping[str, Mapping]) -> str | None:
        if other_kind := unlike_clip(unet, text):
            return other_kind
        if self.pooled_width(unet) != text["text_encoder_2"].get("projection_dim", TEXT_DEFAULT):
            return f"a model whose UNet does not take {TIME_IDS} sizes beside the pooled text, as SDXL's does"
        return None

    def states(self, outputs: Sequence) -> tuple[Tensor, Tensor]:
        """Returns the penultimate states of both encoders, concatenated, and the second's pooled projection."""
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds

    def pooled(self, outputs: Sequence) -> Tensor:
        """Returns the second encoder's projection."""
        return outputs[-1].text_embeds

    def pooled_width(self, unet: Mapping) -> int:
        """Returns the width of the UNet's added embedding minus the part that embeds the sizes."""
        added_width = unet.get("projection_class_embeddings_input_dim") or 0
        return added_width - TIME_IDS * (unet.get("addition_time_embed_dim") or 0)

    def time_ids(self, height: int, width: int) -> list[int]:
        """Returns the original size, the upper left corner of the crop and the target size; height comes first."""
        return [height, width, 0, 0, height, width]

    def zero_null(self, model_index: Mapping) -> bool:
        """Returns True, as in the original's training, unless the file says otherwise."""
        return model_index.get("force_zeros_for_empty_prompt", True)

    def overflows(self, vae: Mapping) -> bool:
        """Returns True, as for the original's VAE, unless the file says otherwise."""
        return vae.get("force_upcast", True)


SDXL = StableDiffusionXL(
    name="sdxl",
    title="SDXL",
    original="stabilityai/stable-diffusion-xl-base-1.0",
    name_signs=("xl",),
    architecture=ARCHITECTURE,
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    prefixes={
        "unet": UNET_PREFIX,
        "vae": VAE_PREFIX,
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    lookalikes={"conditioner.embedders.0.model.": "an SDXL refiner"},
    lora_header={
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    },
    published_rollout={"k": 2, "inner_steps": 4, "merge_last": True},
)
