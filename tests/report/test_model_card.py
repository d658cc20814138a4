"""report/model_card: what a reader of a LoRA's folder needs, and no path of the machine that trained it."""

import yaml

from strop.engine.report.model_card import write_model_card
from strop.engine.report.run import Run

RECIPE = {
    "model": {"path": "some/base-model"},
    "judge": {"path": "/home/me/judges/mine/"},
    "lora": {"rank": 4, "target_modules": ["to_q", "to_k"]},
    "rollout": {"num_steps": 20, "k": 4, "guidance": 5.0},
    "optim": {"lr": 6e-5, "beta": 10.0},
}
SUMMARY = {
    "quality": {"base": 0.491, "tuned": 0.827, "delta": 0.336, "ci95": [0.319, 0.354]},
    "heldout_prompts": 384,
    "prompts": 140,
    "iterations": 14,
    "pairs": 1066,
    "optimizer_steps": 35,
    "seed": 42,
    "version": "0.1.0",
    "paths": {"lora": "/home/me/runs/demo/lora/a.safetensors", "lora_kohya": "/home/me/runs/demo/lora/b.safetensors"},
}


def test_the_card_names_base_figures_and_how_to_load_it(tmp_path):
    run = Run(tmp_path / "demo", [], SUMMARY, yaml.safe_dump(RECIPE))
    card = write_model_card(run, tmp_path).read_text()
    front, body = card.split("---\n")[1:]
    assert yaml.safe_load(front)["base_model"] == "some/base-model"
    for said in ("# demo", "0.491 | 0.827 | +0.336", "1,066", "384", "rank 4 on to_q, to_k", "6e-05", "Licence"):
        assert said in body
    assert "from_pretrained('some/base-model')" in body
    assert "weight_name='a.safetensors'" in body
    assert "`b.safetensors`" in body
    assert "/home/me" not in card
