"""The configuration of PickScore's CLIP (ViT-H/14), from which the paper's judges were trained."""

PICKSCORE = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "projection_dim": 1024, "hidden_act": "gelu",
    },
}  # fmt: skip
