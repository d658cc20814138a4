"""The sides that bench_step compares: a recipe, its own copies of the models, and what an iteration of it takes.

Networks that are not on this machine get random weights at full size, because the cost of an iteration does not depend
on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.bench import ours, published
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.judge.find import load_judge
from strop.engine.methods.spo.rollout import judged_segments
from strop.engine.models.base_model import configure_unet, load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import FORMULAS
from strop.engine.runtime.stopwatch import Stopwatch
from strop.kernels import use_reference

STAGES = ("text", "rollout/trunk", "rollout/branches", "rollout/decode", "rollout/judge", "update", "update/optimizer")


@dataclass(slots=True)
class Side:
    """A recipe that is compared: its models, and what an iteration of it takes. `first` and `rounds` are in seconds,
    `flops` and `rounds` by stage, `peak` in bytes."""

    iteration: ModuleType
    models: published.Published | ours.Ours
    config: SPOConfig
    pairs: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    first: float = 0.0
    rounds: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    profile: dict | None = None

    @property
    def possible_pairs(self) -> int:
        """The pairs of an iteration whose threshold keeps all."""
        rollout = self.config.rollout
        schedule = self.models.diffusion.schedule(rollout.num_steps, rollout.eta, rollout.guidance)
        return rollout.prompts * sum(map(len, judged_segments(schedule, rollout)))

    def run(self, prompts: Sequence[str], clock) -> int:
        """Runs one iteration, with the same draws each time, and returns the number of its pairs."""
        plain = self.iteration is published  # whose judge has none of strop's kernels
        use_reference(plain or self.config.run.kernels == "reference")
        self.models.config = self.config  # another side of the same models may have another
        rngs = [torch.Generator(self.models.diffusion.device).manual_seed(seed) for seed in (0, 1)]
        result = self.iteration.iteration(self.models, prompts[: self.config.rollout.prompts], *rngs, clock)
        return len(result[0]["t"] if isinstance(result, tuple) else result)  # published.py returns its log too


def build(kind: type, config: SPOConfig, device: torch.device) -> published.Published | ours.Ours:
    """Builds copies of the models for one side, since each side changes them in another way."""
    torch.manual_seed(0)
    builder = ModelBuilder.of(config, device=device)
    if Path(config.model.path).exists():
        unet, diffusion = load_unet(config.model, device), LatentDiffusion.load(config.model, device)
        here = Path(config.judge.path).exists()
        judge, decoder = load_judge(config.judge, config.model, diffusion, unet) if here else builder.judge(), None
    else:
        unet, diffusion = configure_unet(builder.unet(), config.model), builder.diffusion()
        judge, decoder = builder.judge(), builder.decoder()
    models = unet, diffusion, judge, config
    return kind(*models) if kind is published.Published else kind(*models, decoder)


def time_one(side: Side, prompts: Sequence[str], device: torch.device) -> None:
    """Times one iteration of a side; on a GPU, its peak memory too, without what the other sides have allocated."""
    clock, whole = Stopwatch(device), Stopwatch(device)  # of one clock, a stage would interrupt the whole
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with whole("total"):
        side.pairs = side.run(prompts, clock)
    side.rounds.append(clock.seconds() | whole.seconds())
    if device.type == "cuda":
        increase = torch.cuda.max_memory_allocated(device) - before
        side.peak = max(side.peak or 0, increase + bytes_of(side.models))


def bytes_of(models: published.Published | ours.Ours) -> int:
    """Returns the bytes of a side's networks between iterations, with the LoRA's gradients and optimizer state."""
    diffusion = models.diffusion
    networks = [models.policy.unet, diffusion.vae, *diffusion.text_encoders, models.judge.network]
    networks += [models.reference] if isinstance(models, published.Published) else []
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum(t.nbytes for t in tensors) + 3 * sum(p.nbytes for p in models.policy.parameters)


def medians(side: Side) -> dict[str, float]:
    """Returns the seconds of each stage and of an iteration: of its rounds, the median."""
    return {name: statistics.median(one.get(name, 0.0) for one in side.rounds) for name in (*STAGES, "total")}


def ratios(baseline: Side, side: Side) -> list[float]:
    """Returns how many times faster a prompt is than in the baseline, in each round."""
    per_prompt = lambda s, i: s.rounds[i]["total"] / s.config.rollout.prompts
    return [per_prompt(baseline, i) / per_prompt(side, i) for i in range(len(side.rounds))]


def gigabytes(peak: int | None) -> str:
    """Returns a peak of memory as text."""
    return f"{peak / 1e9:.1f} GB" if peak else "not measured"


class Meter(TorchDispatchMode):
    """Counts floating-point operations by stage, by PyTorch's formulas."""

    def __init__(self):
        super().__init__()
        self.flops: dict[str, float] = {}
        self.stages = ["other"]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            stage = self.stages[-1]
            self.flops[stage] = self.flops.get(stage, 0) + formula(*args, **(kwargs or {}), out_val=result)
        return result

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Counts the operations inside as those of `stage`; it stands in for a Stopwatch."""
        self.stages.append(stage)
        yield
        self.stages.pop()
