"""models/weight_files: weights that are not finite are refused where they are loaded, by file and tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from strop.engine import cli
from strop.engine.errors import UserError
from strop.engine.models.weight_files import check_finite
from strop.engine.runtime.checkpoint import DIGESTS
from strop.engine.runtime.digests import digests_of

UNET = "diffusion_pytorch_model.safetensors"
POISONED = [  # the model, its file of weights, the command that loads it
    ("model", f"unet/{UNET}", "train {recipe} model.path={poisoned}"),
    ("model", f"vae/{UNET}", "train {recipe} model.path={poisoned}"),
    ("model", "text_encoder/model.safetensors", "train {recipe} model.path={poisoned}"),
    ("file", "", "train {recipe} model.path={poisoned} model.components={model}"),
    ("judge", "model.safetensors", "train {recipe} judge.path={poisoned}"),
    ("decoder", UNET, "train {recipe} rollout.decoder={poisoned}"),
    ("judge", "model.safetensors", "train {recipe} evaluate.scorers=[pickscore={poisoned}]"),
    ("lora", "", "export {poisoned} --format kohya --out new"),
    ("run", "checkpoints/000002/pytorch_lora_weights.safetensors", "train {recipe} run.dir={poisoned} run.resume=true"),
]


@pytest.mark.parametrize("model, file, command", POISONED)
def test_weights_that_are_not_finite_are_refused(
    model, file, command, tiny_folder, tiny_file, clip_folder, tiny_decoder_folder, training_run, recipe,
    tmp_path, monkeypatch, capsys,
):  # fmt: skip
    run, (recipe_file, _) = training_run.folder, recipe()
    places = {"model": tiny_folder, "file": tiny_file, "judge": clip_folder, "decoder": tiny_decoder_folder, "run": run}
    places["lora"] = run / "lora" / "run_kohya.safetensors"
    copy = shutil.copytree if places[model].is_dir() else shutil.copy
    poisoned = copy(places[model], tmp_path / f"poisoned{places[model].suffix}")
    state = load_file(poisoned / file)
    name = next(name for name in sorted(state) if name.endswith("weight"))
    state[name].flatten()[-1] = torch.nan
    save_file(state, poisoned / file, metadata={"format": "pt"})
    if model == "run":  # whose digests would notice, too
        checkpoint = (poisoned / file).parent
        names = json.loads((checkpoint / DIGESTS).read_text())
        (checkpoint / DIGESTS).write_text(json.dumps(digests_of(checkpoint / name for name in names)))
    monkeypatch.chdir(tmp_path)
    words = command.format(recipe=recipe_file, poisoned=poisoned, model=tiny_folder).split()
    with pytest.raises(SystemExit) as stopped:
        cli.main(words if "run.dir" in command or words[0] == "export" else [*words, "run.dir=new"])
    sentence = capsys.readouterr().err
    assert (stopped.value.code, sentence.count("\n")) == (2, 1)
    assert str(poisoned) in sentence
    assert "found 1 of" in sentence
    assert model == "file" or name.removeprefix("text_model.") in sentence
    assert not (tmp_path / "new").exists()


def test_large_numbers_whose_sum_overflows_are_finite():
    large = {"weight": torch.full((9,), 6e4, dtype=torch.float16)}
    assert large["weight"].sum().isinf()
    check_finite(large, "key: file")
    with pytest.raises(UserError, match=r"^key: file: found 2 of 9 .* as float8_e5m2 in weight"):
        check_finite({"weight": torch.tensor([1.0] * 7 + [torch.inf] * 2).to(torch.float8_e5m2)}, "key: file")
