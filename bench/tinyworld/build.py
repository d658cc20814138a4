"""Builds tinyworld: `python -m strop.bench.tinyworld.build [stage ...] [--out DIR]`; without stages, all in order.

Each stage has a separate seed and reads the files of earlier stages, so that stages can be run one by one, with
the same result. One CPU thread unless --threads says otherwise; bit-equal results need the same threads and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from strop.bench.tinyworld import (
    card,
    judge_figures,
    train_examiners,
    train_pickscore,
    train_tiny_decoder,
    train_unet,
    train_vae,
)
from strop.bench.tinyworld.training import record, stage_seed
from strop.bench.tinyworld.world import write_prompts

HERE = Path(__file__).parent


def prompts(weights: Path) -> None:
    """Writes prompts/train.txt and prompts/heldout.txt, beside the weights folder."""
    write_prompts(weights.parent / "prompts", stage_seed("prompts"))


def judge(weights: Path) -> None:
    """Fine-tunes weights/judge, the step-aware preference model, from weights/pickscore by engine/train_judge.py."""
    summary = _trained_judge(weights, "judge", [f"judge.path={weights / 'pickscore'}"])
    record(weights, "judge", judge_figures.evaluate(weights) | summary)


def _trained_judge(weights: Path, name: str, overrides: list[str]) -> dict[str, float]:
    """Trains a judge by configs/<name>_tinyworld.yaml into weights/<name>, in float16; returns what it took."""
    with tempfile.TemporaryDirectory() as run:
        overrides = [*overrides, f"model.path={weights / 'sd'}", f"run.dir={run}"]
        recipe = HERE.parents[1] / "configs" / f"{name}_tinyworld.yaml"
        subprocess.run([sys.executable, "-m", "strop.engine.train_judge", str(recipe), *overrides], check=True)
        shutil.copytree(Path(run) / "judge", weights / name, dirs_exist_ok=True)
        summary = json.loads((Path(run) / "summary.json").read_text())
    for file in (weights / name).rglob("*model.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file, metadata={"format": "pt"})
    settings = {"parameters": summary["parameters"], "steps": summary["optimizer_steps"]}
    return settings | {"seconds": summary["seconds"]["total"]}


def judge_latent(weights: Path) -> None:
    """Trains weights/judge_latent, a latent judge of the base model's own encoder, by engine/train_judge.py."""
    summary = _trained_judge(weights, "judge_latent", [])
    record(weights, "judge_latent", judge_figures.evaluate_latent(weights) | summary)


def base(weights: Path) -> None:
    """Measures by the examiners how well the base model follows held-out captions, and the quality of its images."""
    record(weights, "base", train_unet.evaluate(weights))


STAGES = {
    "prompts": prompts,
    "vae": train_vae.train,
    "unet": train_unet.train,
    "tiny_decoder": train_tiny_decoder.train,
    "examiners": train_examiners.train,
    "pickscore": train_pickscore.train,
    "base": base,
    "judge": judge,
    "judge_latent": judge_latent,
    "card": card.write,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build tinyworld's prompts and weights.")
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of: {', '.join(STAGES)} (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="the weights folder (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)")
    args = parser.parse_args()
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    torch.set_num_threads(args.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))  # for the judge's subprocess
    for stage in args.stages or STAGES:
        STAGES[stage](args.out)


if __name__ == "__main__":
    main()
