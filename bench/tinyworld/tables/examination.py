"""Draws tinyworld's prompts with a LoRA, and scores the images by what is the same for all rows.

The examiners give quality and alignment, PickScore and the step-aware judge see clean images at t = 0, and the twin of
GenEval asks for objects, colours and places. The protocol is that of engine/evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from strop.bench.tinyworld import examiners, geneval
from strop.bench.tinyworld.examiners import WEIGHTS
from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.evaluation.sampling import Sampler
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.base_model import load_unet
from strop.engine.models.guided_unet import GuidedUNet, Savings
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.lora_source import add_lora, find_lora
from strop.engine.scorers.scorer import levels

SCORES = ("quality", "alignment", "pickscore", "judge")
STEPS, GUIDANCE, NOISE_SEED, BATCH = 20, 3.0, 0, 64
CPU = torch.device("cpu")


class Examination:
    """Scores images of prompts that no row trains on. Noise belongs to a prompt's number, whatever is measured."""

    def __init__(self, prompts: Sequence[str]):
        """Loads all networks but the UNet."""
        self.prompts = list(prompts)
        self.model = ModelConfig(path=str(WEIGHTS / "sd"))
        self.diffusion = LatentDiffusion.load(self.model, CPU)
        self.cond = self.diffusion.encode(self.prompts)
        self.examine = examiners.load(CPU)
        judges = {"pickscore": ("pickscore", "pickscore"), "judge": ("judge", "spm")}
        self.judges = {
            name: StepAwarePreferenceModel.load(JudgeConfig(path=str(WEIGHTS / folder), kind=kind), CPU)
            for name, (folder, kind) in judges.items()
        }
        with torch.no_grad():
            self.text = {name: judge.encode(self.prompts) for name, judge in self.judges.items()}

    @torch.no_grad()
    def __call__(self, lora: Path | None, count: int | None = None) -> dict[str, Tensor]:
        """Returns SCORES (count,) of the first `count` prompts, all by default; lora: its folder, None for the base."""
        count, sampler = count or len(self.prompts), self._sampler(lora)
        noise = sampler.noise(len(self.prompts), NOISE_SEED)
        parts = [self._scored(sampler, noise, rows) for rows in torch.arange(count).split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in SCORES}

    def _sampler(self, lora: Path | None) -> Sampler:
        unet = load_unet(self.model, CPU)
        if lora is not None:
            file, found = find_lora(lora)
            add_lora(unet, found, file, self.model.path)
        network = GuidedUNet(unet, self.diffusion.latent_shape, Savings.of(self.model, 1))
        return Sampler(network, self.diffusion, self.diffusion.schedule(STEPS, eta=0.0, guidance=GUIDANCE))

    def _scored(self, sampler: Sampler, noise: Tensor, rows: Tensor) -> dict[str, Tensor]:
        images = levels(sampler(noise[rows], self.cond[rows], lambda: None)) / 127.5 - 1
        scores = self.examine(images, [self.prompts[row] for row in rows.tolist()])
        for name, judge in self.judges.items():
            scores[name] = judge.score_images(images.unsqueeze(0), self.text[name][rows], t=0)[0]
        return scores


def answers(lora: Path | None, prompts: int, images: int) -> dict[str, list[float]]:
    """Returns by task of GenEval's twin the share of right images of each of its prompts."""
    shares: dict[str, list[float]] = {task: [] for task in geneval.TASKS}
    lines = geneval.drawn(geneval.metadata(prompts), images, lora)
    for start in range(0, len(lines), images):
        shares[lines[start]["tag"]].append(fmean(line["correct"] for line in lines[start : start + images]))
    return shares
