"""Measures how good tinyworld's judges are: `python -m strop.bench.tinyworld.judge_figures [FOLDER]`.

The figures are the share of labels that a judge agrees with, by timestep, and whether it still reads the caption: a
judge that looks at quality alone would agree with most labels, and SPO would trade alignment for gloss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from strop.bench.tinyworld.pairs import preference_pairs
from strop.bench.tinyworld.render import to_float
from strop.bench.tinyworld.train_vae import render_uint8
from strop.bench.tinyworld.training import generator
from strop.bench.tinyworld.world import break_scene, caption, sample_quality, sample_scenes
from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.judge.denoiser import Denoiser, Noiser
from strop.engine.judge.find import AnyJudge, load_judge
from strop.engine.judge.loss import preference_scores
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.judge.views import ImageViews, LatentViews, Views
from strop.engine.models.base_model import load_unet, quiet_libraries
from strop.engine.models.latent_diffusion import LatentDiffusion

TIMESTEPS = (0, 251, 501, 701, 951)
GUIDANCE = 3.0  # of configs/judge_tinyworld.yaml
CPU = torch.device("cpu")


def evaluate(weights: Path, judge: Path | None = None, count: int = 512) -> dict[str, float]:
    """Returns figures of the judge in weights/judge (or another folder), and of weights/pickscore under `pickscore_`.

    accuracy_t: share of labels agreed with, ties left out, on `count` fresh pairs shown at timestep t (0: clean);
    accuracy_t_broken: where one image of the two breaks the caption; faithful_t: how often, of two images of equal
    quality, the one that follows the caption scores above the one with an attribute changed.
    """
    configs = {
        "": JudgeConfig(path=str(judge or weights / "judge")),
        "pickscore_": JudgeConfig(path=str(weights / "pickscore"), kind="pickscore"),
    }
    models = {prefix: StepAwarePreferenceModel.load(config, CPU) for prefix, config in configs.items()}
    model = ModelConfig(path=str(weights / "sd"))
    denoiser = Denoiser(LatentDiffusion.load(model, CPU), load_unet(model, CPU), GUIDANCE)
    judges = {prefix: (each, ImageViews(each, denoiser)) for prefix, each in models.items()}
    return _figures(judges, count, generator("judge/evaluate"))


def evaluate_latent(weights: Path, count: int = 512) -> dict[str, float]:
    """Returns such figures of the judge in weights/judge_latent; each image of a pair has noise of its own."""
    model = ModelConfig(path=str(weights / "sd"))
    diffusion, config = LatentDiffusion.load(model, CPU), JudgeConfig(path=str(weights / "judge_latent"), kind="latent")
    judge = load_judge(config, model, diffusion, load_unet(model, CPU))
    views = LatentViews(Noiser(diffusion, shared_noise=False))
    return _figures({"": (judge, views)}, count, generator("judge_latent/evaluate"))


@torch.no_grad()
def _figures(judges: dict[str, tuple[AnyJudge, Views]], count: int, rng: torch.Generator) -> dict[str, float]:
    """Returns the figures of judges, each under its prefix; all are shown the same noise."""
    pairs = preference_pairs(count, rng)
    decided, one_broken = pairs.label_0 != 0.5, pairs.broken[:, 0] != pairs.broken[:, 1]
    scenes, q = sample_scenes(count, rng), sample_quality(count, rng)
    twins = [render_uint8(shown, q, rng) for shown in (scenes, [break_scene(s, rng) for s in scenes])]
    figures = {
        "bayes_accuracy": pairs.bayes_accuracy(decided),
        "bayes_accuracy_broken": pairs.bayes_accuracy(one_broken),
    }
    for t in TIMESTEPS:
        better = _first_scores_higher(judges, (pairs.images_0, pairs.images_1), pairs.captions, t, rng)
        faithful = _first_scores_higher(judges, twins, [caption(s) for s in scenes], t, rng)
        for prefix in judges:
            right = better[prefix] == (pairs.label_0 > 0.5)
            figures[f"{prefix}accuracy_{t}"] = right[decided].float().mean().item()
            figures[f"{prefix}accuracy_{t}_broken"] = right[decided & one_broken].float().mean().item()
            figures[f"{prefix}faithful_{t}"] = faithful[prefix].float().mean().item()
    return figures


def _first_scores_higher(
    judges: dict[str, tuple[AnyJudge, Views]],
    images: tuple[Tensor, Tensor],
    captions: list[str],
    t: int,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Returns by judge whether the first of two uint8 images (n, 3, 64, 64) scores higher at timestep t, (n,) bool."""
    higher = {prefix: [] for prefix in judges}
    for start in range(0, len(captions), 64):
        part = torch.stack([to_float(side[start : start + 64]) for side in images])  # (2, n, 3, 64, 64)
        names, state = captions[start : start + 64], rng.get_state()
        for prefix, (judge, views) in judges.items():
            cond = views.noiser.diffusion.encode(names) if views.reads_text else None
            posterior = views.noiser.diffusion.posterior(part)
            shown = views.scored(part, posterior, t, cond, rng.set_state(state))
            scores = preference_scores(judge, shown, judge.encode(names), torch.full((len(names),), t))
            higher[prefix].append(scores[0] > scores[1])
    return {prefix: torch.cat(parts) for prefix, parts in higher.items()}


if __name__ == "__main__":
    quiet_libraries()
    folder = Path(__file__).parent / "weights"
    print(json.dumps(evaluate(folder, *map(Path, sys.argv[1:2])), indent=2))
    print(json.dumps(evaluate_latent(folder), indent=2))
