"""SD-1.5 has one text encoder; its states are all that the UNet takes besides latent and timestep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from .base import Family
from .shared import CLIP_L, NOISE, UNET_PREFIX, VAE, VAE_PREFIX, unlike_clip

ARCHITECTURE = {
    "model_index": {"_class_name": "StableDiffusionPipeline"},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae": VAE | {"sample_size": 512},
    "text_encoder": CLIP_L,
    "scheduler": NOISE | {"_class_name": "PNDMScheduler"},
}


class StableDiffusion1(Family):
    """Stable Diffusion 1.x and its fine-tunes."""

    def takes(self, unet: Mapping) -> bool:
        return unet.get("addition_embed_type") is None

    def lookalike(self, unet: Mapping, parts: Collection[str]) -> str | None:
        """Recognises SD-2, with the same inputs, by linear layers around its attention, where SD-1 has convolutions.

        No file can say otherwise and still load: the weights of the one do not have the shape of the other's. Widths
        tell nothing of small models, and v-prediction nothing of fine-tunes. The text encoder is another one in SD-2
        (OpenCLIP ViT-H), but a fine-tune of SD-1.5 may have any, and its LoRA fits SD-1.5 all the same.
        """
        return "a Stable Diffusion 2" if unet.get("use_linear_projection") else None

    def unlike_text(self, unet: Mapping, text: Mapping[str, Mapping]) -> str | None:
        return unlike_clip(unet, text)

    def states(self, outputs: Sequence) -> tuple[Tensor, None]:
        """Returns the encoder's last states, after the final LayerNorm."""
        return outputs[0].last_hidden_state, None

    def pooled(self, outputs: Sequence) -> Tensor:
        """Returns the encoder's state at the end of the prompt, not projected."""
        return outputs[0].pooler_output

    def pooled_width(self, unet: Mapping) -> None:
        return None

    def time_ids(self, height: int, width: int) -> None:
        return None

    def zero_null(self, model_index: Mapping) -> bool:
        return False

    def overflows(self, vae: Mapping) -> bool:
        return False


SD15 = StableDiffusion1(
    name="sd15",
    title="Stable Diffusion 1.5",
    original="stable-diffusion-v1-5/stable-diffusion-v1-5",
    name_signs=(),
    architecture=ARCHITECTURE,
    text_encoders={"text_encoder": "CLIPTextModel"},
    prefixes={"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": "cond_stage_model."},
    lookalikes={"cond_stage_model.model.": "a Stable Diffusion 2"},
    lora_header={"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"},
    published_rollout={"k": 4, "inner_steps": 1, "merge_last": False},
)
