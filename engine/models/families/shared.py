"""Names and configurations that SD-1.5 and SDXL share: tensor prefixes of a checkpoint, networks at full size."""

from __future__ import annotations

from collections.abc import Mapping

CHANNELS = 4  # of a latent
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."  # of a tensor's name in a checkpoint
TEXT_DEFAULT = 512  # transformers' default for both widths of a text encoder; files omit defaults
VAE = {  # but for its size
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [
        "DownEncoderBlock2D",
        "DownEncoderBlock2D",
        "DownEncoderBlock2D",
        "DownEncoderBlock2D",
    ],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
}
CLIP_L = {  # OpenAI's CLIP ViT-L/14
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
NOISE = {  # the noise schedule of training
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def unlike_clip(unet: Mapping, text: Mapping[str, Mapping]) -> str | None:
    """Describes a model whose text encoders are not CLIP's or not together as wide as its UNet takes; None if they are.

    unet, text: the configurations of the UNet and, by part, of the text encoders.
    """
    kinds = [config.get("model_type") for config in text.values()]
    if set(kinds) != {"clip_text_model"}:
        return f"a model with text encoders of type {', '.join(map(str, kinds))}"
    widths = [config.get("hidden_size", TEXT_DEFAULT) for config in text.values()]
    if sum(widths) != unet.get("cross_attention_dim"):
        return f"a model whose UNet takes text {unet.get('cross_attention_dim')} wide from encoders of {widths}"
    return None
