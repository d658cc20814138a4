"""From preference pairs to a judge, from the judge to a LoRA, from the LoRA to an image: the recipes as they ship."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from strop.engine import train, train_judge

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def jsonl(tmp_path):
    """24 pairs of noise: the image of fewer colours is preferred, every third pair is a tie."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        for side, levels in (("a", 256), ("b", 4)):
            pixels = (rng.integers(0, levels, (20, 18, 3)) * (255 // (levels - 1))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}{side}.png")
        label = "tie" if i % 3 == 2 else 1
        rows.append({"image_0": f"{i}a.png", "image_1": f"{i}b.png", "caption": f"a cat {i % 8}", "label": label})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.json").write_text(json.dumps([{"caption": f"a dog {i}"} for i in range(8)]))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_two_commands_go_from_pairs_to_a_lora(family, jsonl, tiny_folder, tiny_sdxl_folder, clip_folder):
    folder = {"sd15": tiny_folder, "sdxl": tiny_sdxl_folder}[family]
    base = [f"model.path={folder}", "model.vae=null", "model.dtype=float32", "judge.components=null"]
    pairs = [f"data.source={jsonl / 'pairs.jsonl'}", "data.heldout_source=null", "data.heldout=6", "data.workers=0"]
    brief = ["optim.steps=4", "optim.batch=4", "optim.warmup=1", "optim.lr=1e-4", f"run.dir={jsonl / 'judge-run'}"]
    train_judge.main([str(CONFIGS / f"judge_{family}.yaml"), *base, f"judge.path={clip_folder}", *pairs, *brief])
    rollout = ["rollout.prompts=2", "rollout.threshold=0", "lora.rank=4", "optim.lr=1e-2"]
    brief = [f"prompts.train={jsonl / 'prompts.json'}", "evaluate.prompts=2", "evaluate.scorers=[]", "run.iterations=1"]
    judge = [f"judge.path={jsonl / 'judge-run' / 'judge'}", f"run.dir={jsonl / 'run'}"]
    train.main([str(CONFIGS / f"{family}.yaml"), *base, *judge, *rollout, *brief])

    def image(lora=None):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        rng = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=3, generator=rng, output_type="np").images[0]

    diffusers, kohya = image(jsonl / "run" / "lora"), image(jsonl / "run" / "lora" / "run_kohya.safetensors")
    assert np.isfinite(diffusers).all()
    assert np.abs(diffusers - image()).max() > 1e-3
    assert np.abs(diffusers - kohya).max() < 1e-5
