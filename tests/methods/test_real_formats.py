"""Every method through whole folders of SD-1.5 and SDXL, to a LoRA that diffusers opens and that changes images."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from strop.engine import train
from strop.engine.config.find import names


@pytest.mark.parametrize("family, pipeline", [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
@pytest.mark.parametrize("method", [name for name in names() if name != "spo"])  # test_end_to_end has SPO
def test_a_lora_of_this_method_opens_in_diffusers(
    method, family, pipeline, method_recipe, tiny_folder, tiny_sdxl_folder, tmp_path
):
    folder = tiny_folder if family == "sd15" else tiny_sdxl_folder
    train.main(method_recipe(method, f"model.path={folder}", "run.iterations=1", "optim.lr=0.1"))
    pipe = (
        pipeline.from_pretrained(folder, safety_checker=None) if family == "sd15" else pipeline.from_pretrained(folder)
    )
    pipe.set_progress_bar_config(disable=True)
    draw = lambda: (
        pipe(
            "a b",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            height=16,
            width=16,
        ).images
    )
    base = draw()
    pipe.load_lora_weights(tmp_path / "run" / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert abs(draw() - base).max() > 1e-3
