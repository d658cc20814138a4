"""Times strop against the published recipe: `python -m strop.bench.bench_step tinyworld`, or sd15, or sdxl.

The baseline (published.py), the exact recipe and the fast one take turns in one process, an iteration each, on the same
networks and prompts. The record has, per side and stage, seconds, operations, and the share of the rate that matrix
products reach in the same run; peak memory and pairs per second; how many times faster a prompt is done, and the whole
run, for which the fast recipe has fewer prompts; and the operations in which the exact recipe spends most time.
Networks that are not on this machine get random weights at full size, because the cost of an iteration does not depend
on them. Every pair is trained on, as plan counts, unless --threshold is set. Prompts are encoded anew in each
iteration, as if none came twice. Quality is measured by bench/tinyworld/frontier.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strop.bench import longest, ours, published
from strop.bench.machine import machine, start_bench, write
from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import varied
from strop.engine.data.prompts import read_prompts
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.base_model import DTYPES, configure_unet, load_unet, quiet_libraries
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.plan.gpus import GPUS, gpu_of_cuda_name
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.meter import FORMULAS
from strop.engine.plan.peak import seconds_on
from strop.engine.runtime.stopwatch import Stopwatch
from strop.kernels import use_reference

ROOT = Path(__file__).parents[1]
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

    def run(self, prompts: Sequence[str], clock) -> int:
        """Runs one iteration, with the same draws each time, and returns the number of its pairs."""
        plain = self.iteration is published  # whose judge has none of strop's kernels
        use_reference(plain or self.config.run.kernels == "reference")
        rngs = [torch.Generator(self.models.diffusion.device).manual_seed(seed) for seed in (0, 1)]
        result = self.iteration.iteration(self.models, prompts[: self.config.rollout.prompts], *rngs, clock)
        return len(result[0]["t"] if isinstance(result, tuple) else result)  # published.py returns its log too


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times the published recipe, strop's and the fast one in turn, and prints the seconds and operations of each."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.bench_step", description=main.__doc__)
    parser.add_argument(
        "recipe", help="tinyworld, sd15, sdxl or sdxl_released: of configs/, with the family's fast one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all sides, such as model.compile=all")
    parser.add_argument("--rounds", type=int, default=3, help="timed iterations of each side, at least 1")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="rollout.threshold of all sides; 0 keeps every pair"
    )
    parser.add_argument("--no-profile", action="store_true", help="leave out which operations take longest")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the machine's in bench/results/)")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    if args.rounds < 1:
        raise UserError(f"--rounds: found {args.rounds}, expected 1 or more")
    overrides = [*args.overrides, f"rollout.threshold={args.threshold}"]
    names = args.recipe, f"{args.recipe.removesuffix('_released')}_fast"
    exact, fast = (load(ROOT / "configs" / f"{name}.yaml", overrides) for name in names)
    device = start_bench("bench_step", exact)
    record = measure(exact, fast, args.recipe, args.rounds, device, not args.no_profile)
    print(f"\n{table(record)}")
    if not args.no_profile:
        print(f"\nexact:\n\n{longest.table(record['sides']['exact']['profile'])}")
    print(f"\nwritten to {write(record, name_of(record), args.out)}")


def measure(
    exact: SPOConfig, fast: SPOConfig, recipe: str, rounds: int, device: torch.device, profiled: bool = True
) -> dict:
    """Runs all sides `rounds` times in turn, after one iteration that counts operations, and returns the record.

    profiled: whether each then runs once more, to find which of its operations take longest.
    """
    file = Path(exact.prompts.train)
    prompts = read_prompts(str(file), "prompts.train") if file.exists() else [f"prompt {i}" for i in range(64)]
    plain = varied(exact, {"model.gradient_checkpointing": False})  # the authors' code keeps activations
    sides = {
        "published": Side(published, build(published.Published, plain, device), plain),
        "exact": Side(ours, build(ours.Ours, exact, device), exact),
        "fast": Side(ours, build(ours.Ours, fast, device), fast),
    }
    for name, side in sides.items():
        meter = Meter()
        with meter, torch.compiler.set_stance("force_eager"):
            side.pairs = side.run(prompts, meter.clock)
        side.flops = meter.flops
        if side.config.model.compile:
            begun = time.perf_counter()
            side.run(prompts, Stopwatch(device))
            side.first = time.perf_counter() - begun
        print(f"{name}: {side.pairs} pairs and {sum(meter.flops.values()) / 1e12:.3g} TFLOP an iteration", flush=True)
    begun = time.perf_counter()
    for done in range(1, rounds + 1):
        for side in sides.values():
            time_one(side, prompts, device)
        spent = time.perf_counter() - begun
        left = spent / done * (rounds - done)
        print(f"round {done} of {rounds}, {spent:.0f} s, {left:.0f} s to go", flush=True)
    for side in sides.values() if profiled else ():
        side.profile = longest.longest(device, side.run, prompts, nullcontext)
    rate = matmul_rate(device, DTYPES[exact.model.dtype])
    return {
        "recipe": recipe,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": exact.model.dtype,
        "compile": exact.model.compile,
        "threshold": exact.rollout.threshold,
        "rounds": rounds,
        "matmul_tflop_per_second": rate / 1e12,
        "sides": {name: summary(side, rate) for name, side in sides.items()},
        **at_peak(sides["exact"], device),
        "faster_per_prompt": {name: ratio(sides["published"], sides[name]) for name in ("exact", "fast")},
        "faster_per_run": {
            name: ratio(sides["published"], sides[name]) * run_prompts(exact) / run_prompts(sides[name].config)
            for name in ("exact", "fast")
        },
    }


def at_peak(side: Side, device: torch.device) -> dict[str, str | float]:
    """Returns the entries that plan reads: the key of the GPU, and the share of its peak that this side reached.

    The result is empty on a CPU and for a GPU that plan's list does not have.
    """
    gpu = gpu_of_cuda_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return {}
    peak = seconds_on(gpu, side.config, side.models.diffusion.family)
    key = next(key for key, candidate in GPUS.items() if candidate is gpu)
    seconds = statistics.median(one["total"] for one in side.rounds)
    return {
        "gpu": key,
        "share_of_peak": (side.config.rollout.prompts * peak["prompts"] + side.pairs * peak["pairs"]) / seconds,
    }


def name_of(record: dict) -> str:
    """Returns the name of the record's file, without its ending."""
    how = f"-threshold-{record['threshold']:g}" if record["threshold"] else ""
    return f"step-{record['recipe']}{how}{'-compiled' if record['compile'] else ''}"


def run_prompts(config: SPOConfig) -> int:
    """Returns how many prompts a run of this recipe rolls out on one process."""
    return config.run.iterations * config.rollout.prompts


def build(kind: type, config: SPOConfig, device: torch.device) -> published.Published | ours.Ours:
    """Builds copies of the models for one side, since each side changes them in another way."""
    if Path(config.model.path).exists():
        judge = StepAwarePreferenceModel.load(config.judge, device)
        return kind(load_unet(config.model, device), LatentDiffusion.load(config.model, device), judge, config)
    torch.manual_seed(0)
    builder = ModelBuilder.of(config, device=device)
    unet, diffusion = configure_unet(builder.unet(), config.model), builder.diffusion()
    if kind is published.Published:
        return kind(unet, diffusion, builder.judge(), config)
    return kind(unet, diffusion, builder.judge(), config, builder.decoder())


def time_one(side: Side, prompts: Sequence[str], device: torch.device) -> None:
    """Times one iteration of a side; on a GPU, its peak memory too, without what the other sides have allocated."""
    clock, whole = Stopwatch(device), Stopwatch(device)  # of one clock, a stage would interrupt the whole
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with whole("total"):
        side.run(prompts, clock)
    side.rounds.append(clock.seconds() | whole.seconds())
    if device.type == "cuda":
        increase = torch.cuda.max_memory_allocated(device) - before
        side.peak = max(side.peak or 0, increase + bytes_of(side.models))


def bytes_of(models: published.Published | ours.Ours) -> int:
    """Returns the bytes of a side's networks between iterations, with the LoRA's gradients and optimizer state."""
    diffusion = models.diffusion
    networks = [models.policy.unet, diffusion.vae, *diffusion.text_encoders, models.judge.clip]
    networks += [models.reference] if isinstance(models, published.Published) else []
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum(t.nbytes for t in tensors) + 3 * sum(p.nbytes for p in models.policy.parameters)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per second of a large matrix product, the best of several."""
    size, times = (8192, 10) if device.type == "cuda" else (1024, 30)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(times):
        clock = Stopwatch(device)
        with clock("product"):
            a @ b
        best = min(best, clock.seconds()["product"])
    return 2 * size**3 / best


def summary(side: Side, rate: float) -> dict:
    """Returns a side's entries of the record; seconds are medians of the rounds. rate: FLOP/s of matrix products."""
    seconds = medians(side)
    tflop = {name: side.flops.get(name, 0.0) / 1e12 for name in STAGES}
    tflop["update"] += tflop["update/optimizer"]
    tflop["total"] = sum(side.flops.values()) / 1e12
    prompts = side.config.rollout.prompts
    return {
        "prompts": prompts,
        "pairs": side.pairs,
        "first_seconds": side.first,
        "seconds": seconds,
        "tflop": tflop,
        "share_of_matmul": {
            name: 1e12 * tflop[name] / seconds[name] / rate if seconds[name] else None for name in tflop
        },
        "peak_bytes": side.peak,
        "profile": side.profile,
        "seconds_per_prompt": seconds["total"] / prompts,
        "pairs_per_second": side.pairs / seconds["total"],
    }


def medians(side: Side) -> dict[str, float]:
    """Returns the seconds of each stage and of an iteration: of its rounds, the median."""
    return {name: statistics.median(one.get(name, 0.0) for one in side.rounds) for name in (*STAGES, "total")}


def gigabytes(peak: int | None) -> str:
    """Returns a peak of memory as text."""
    return f"{peak / 1e9:.1f} GB" if peak else "not measured"


def ratio(baseline: Side, side: Side) -> float:
    """Returns how many times faster a prompt is than in the baseline: the median of the ratios of each round."""
    per_prompt = lambda s, i: s.rounds[i]["total"] / s.config.rollout.prompts
    return statistics.median(per_prompt(baseline, i) / per_prompt(side, i) for i in range(len(side.rounds)))


def table(record: dict) -> str:
    """Returns the record as a table in Markdown."""
    sides = record["sides"]
    compiled = ", strop compiled" if record["compile"] else ""
    lines = [
        f"{record['recipe']} on {record['machine']}, {record['threads']} threads, {record['dtype']}, PyTorch "
        f"{record['torch']}, threshold {record['threshold']:g}{compiled}: seconds of an iteration, and in brackets the "
        f"share of the rate of matrix products, {record['matmul_tflop_per_second']:.3g} TFLOP/s",
        "",
        "| | " + " | ".join(sides) + " |",
        "|---|" + "---|" * len(sides),
    ]
    for stage in (*STAGES, "total"):
        cells = [cell(side["seconds"][stage], side["share_of_matmul"][stage]) for side in sides.values()]
        lines.append(f"| {stage.split('/')[-1]} | " + " | ".join(cells) + " |")
    rows = {
        "TFLOP": lambda side: f"{side['tflop']['total']:.3g}",
        "prompts, pairs": lambda side: f"{side['prompts']}, {side['pairs']}",
        "seconds a prompt": lambda side: f"{side['seconds_per_prompt']:.3g}",
        "pairs a second": lambda side: f"{side['pairs_per_second']:.3g}",
        "peak memory": lambda side: gigabytes(side["peak_bytes"]),
    }
    lines += [f"| {name} | " + " | ".join(map(show, sides.values())) + " |" for name, show in rows.items()]
    if record["compile"]:
        firsts = [f"{side['first_seconds']:.3g}" for side in sides.values()]
        lines.append(f"| first iteration, with compiling | {' | '.join(firsts)} |")
    for name in ("faster_per_prompt", "faster_per_run"):
        cells = [f"**{record[name][side]:.2f}x**" if side in record[name] else "1" for side in sides]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(seconds: float, share: float | None) -> str:
    return f"{seconds:.3g} ({share:.0%})" if share else f"{seconds:.3g}"


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


if __name__ == "__main__":
    main()
