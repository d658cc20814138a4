"""Times strop against the published recipe: `python -m strop.bench.bench_step tinyworld`, or sd15, or sdxl.

The baseline (published.py), the exact recipe, the fast one, the exact one with a judge that reads latents, and the fast
one with such a judge take turns in one process, an iteration each, on the same prompts and on copies of the same
networks (sides.py). The record has, per side and stage, seconds, operations, and the share of the rate that matrix
products reach in the same run; peak memory and pairs per second; how many times faster a prompt is done, and the whole
run, for which the fast recipes have fewer prompts; and the operations in which the exact recipe spends most time. All
of it is at the first of --thresholds, 0 where every pair is trained on, as plan counts; at the others it has the ratios
and the share of pairs that is kept, which means something of trained judges alone. Prompts are encoded anew in each
iteration, as if none came twice. The record is written after each side. Quality is measured by
bench/tinyworld/frontier.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from strop.bench import longest, ours, published
from strop.bench.machine import machine, start_bench, write
from strop.bench.sides import STAGES, Meter, Side, build, gigabytes, medians, ratios, time_one
from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import varied
from strop.engine.data.prompts import read_prompts
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.models.base_model import DTYPES, quiet_libraries
from strop.engine.plan.gpus import GPUS, gpu_of_cuda_name
from strop.engine.plan.peak import seconds_on
from strop.engine.runtime.stopwatch import Stopwatch

ROOT = Path(__file__).parents[1]
OTHERS = ("fast", "latent", "latent_fast")  # sides beside the published and the exact one


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times the published recipe and strop's in turn, and prints the seconds and operations of each."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.bench_step", description=main.__doc__)
    parser.add_argument(
        "recipe", help="tinyworld, sd15, sdxl or sdxl_released: of configs/, with the family's fast one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all sides, such as model.compile=all")
    parser.add_argument("--rounds", type=int, default=3, help="timed iterations of each side, at least 1")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.3],
        metavar="SHARE",
        help="rollout.threshold of all sides; 0 keeps every pair",
    )
    parser.add_argument("--sides", nargs="*", choices=OTHERS, default=OTHERS, help="beside the published and exact one")
    parser.add_argument("--no-profile", action="store_true", help="leave out which operations take longest")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the machine's in bench/results/)")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    if args.rounds < 1:
        raise UserError(f"--rounds: found {args.rounds}, expected 1 or more")
    if wrong := [threshold for threshold in args.thresholds if not 0 <= threshold < 1]:
        raise UserError(f"--thresholds: found {wrong[0]:g}, expected 0 or more and less than 1")
    exact, others = recipes(args.recipe, [*args.overrides, f"rollout.threshold={args.thresholds[0]}"], args.sides)
    device = start_bench("bench_step", exact)
    for measured in measure(exact, others, args.rounds, device, args.thresholds, not args.no_profile):
        record = {"recipe": args.recipe, **measured}
        target = write(record, name_of(record), args.out)
    print(f"\n{table(record)}")
    if not args.no_profile:
        print(f"\nexact:\n\n{longest.table(record['sides']['exact']['profile'])}")
    print(f"\nwritten to {target}")


def recipes(name: str, overrides: Sequence[str], names: Sequence[str]) -> tuple[SPOConfig, dict[str, SPOConfig]]:
    """Returns (exact recipe, the named of OTHERS). A latent judge may lie beside the base model, as judge_latent.

    Raises UserError for a judge that the published code cannot have.
    """
    exact = load(ROOT / "configs" / f"{name}.yaml", overrides)
    if exact.judge.kind == "latent":
        raise UserError("judge.kind: found latent, expected a judge of images, which alone the published code has")
    latent = {"judge.kind": "latent", "judge.path": str(Path(exact.model.path).parent / "judge_latent")}
    family = ROOT / "configs" / name.removesuffix("_released")
    make = {
        "fast": lambda: load(f"{family}_fast.yaml", overrides),
        "latent": lambda: varied(exact, latent),
        "latent_fast": lambda: load(f"{family}_latent_fast.yaml", overrides),
    }
    return exact, {each: make[each]() for each in OTHERS if each in names}


def measure(
    exact: SPOConfig,
    others: dict[str, SPOConfig],
    rounds: int,
    device: torch.device,
    thresholds: Sequence[float] = (),
    profiled: bool = True,
) -> Iterator[dict]:
    """Runs all sides `rounds` times in turn, the first time after an iteration that counts operations.

    Yields the record of what has been timed so far, from the exact recipe on, after each side and last of all.
    thresholds: at which the ratios are measured, beside that of `exact`. profiled: whether the exact recipe then runs
    once more, to find which of its operations take longest.
    """
    file = Path(exact.prompts.train)
    prompts = read_prompts(str(file), "prompts.train") if file.exists() else [f"prompt {i}" for i in range(64)]
    plain = varied(exact, {"model.gradient_checkpointing": False})  # the authors' code keeps activations
    sides = {"published": Side(published, build(published.Published, plain, device), plain)}
    sides |= {name: Side(ours, build(ours.Ours, c, device), c) for name, c in ({"exact": exact} | others).items()}
    at = {threshold: at_threshold(sides, threshold) for threshold in thresholds if threshold != exact.rollout.threshold}
    at = {exact.rollout.threshold: sides} | at
    rate = matmul_rate(device, DTYPES[exact.model.dtype])
    for _ in time_in_turn(list(at.values()), rounds, prompts, device):
        if sides["exact"].rounds:
            yield record_of(at, rounds, rate, device)
    if profiled:
        sides["exact"].profile = longest.longest(device, sides["exact"].run, prompts, nullcontext)
        yield record_of(at, rounds, rate, device)


def record_of(at: dict[float, dict[str, Side]], rounds: int, rate: float, device: torch.device) -> dict:
    """Returns the record of the sides that have been timed. at: sides by threshold; rate: FLOP/s of matrix products."""
    at = {threshold: {name: side for name, side in group.items() if side.rounds} for threshold, group in at.items()}
    threshold, sides = next(iter(at.items()))
    exact, faster = sides["exact"].config, compared(sides)["faster_per_prompt"]
    return {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": exact.model.dtype,
        "compile": exact.model.compile,
        "threshold": threshold,
        "rounds": rounds,
        "matmul_tflop_per_second": rate / 1e12,
        "sides": {name: summary(side, rate) for name, side in sides.items()},
        **at_peak(sides["exact"], device),
        "faster_per_prompt": faster,
        "faster_per_run": {
            name: value * run_prompts(exact) / run_prompts(sides[name].config) for name, value in faster.items()
        },
        "thresholds": {f"{threshold:g}": compared(each) for threshold, each in at.items() if each},
    }


def warm(side: Side, prompts: Sequence[str], device: torch.device) -> None:
    """Runs one iteration that counts operations, and where there is something to compile another that compiles."""
    meter = Meter()
    with meter, torch.compiler.set_stance("force_eager"):
        side.pairs = side.run(prompts, meter.clock)
    side.flops = meter.flops
    if side.config.model.compile:
        begun = time.perf_counter()
        side.run(prompts, Stopwatch(device))
        side.first = time.perf_counter() - begun


def at_threshold(sides: dict[str, Side], threshold: float) -> dict[str, Side]:
    """Returns sides of the same models with another rollout.threshold."""
    config = lambda side: varied(side.config, {"rollout.threshold": threshold})
    return {name: Side(side.iteration, side.models, config(side)) for name, side in sides.items()}


def time_in_turn(
    groups: list[dict[str, Side]], rounds: int, prompts: Sequence[str], device: torch.device
) -> Iterator[None]:
    """Times an iteration of every side of one group after the other, and all of that `rounds` times.

    Yields after each iteration. Before a side of the first group is timed for the first time, it is warmed up.
    """
    begun = time.perf_counter()
    for done in range(1, rounds + 1):
        for group in groups:
            for name, side in group.items():
                if group is groups[0] and not side.rounds:
                    warm(side, prompts, device)
                    print(f"{name}: {side.pairs} pairs, {sum(side.flops.values()) / 1e12:.3g} TFLOP", flush=True)
                time_one(side, prompts, device)
                yield
        spent = time.perf_counter() - begun
        left = spent / done * (rounds - done)
        print(f"round {done} of {rounds}, {spent:.0f} s, {left:.0f} s to go", flush=True)


def compared(sides: dict[str, Side]) -> dict:
    """Returns how many times faster a prompt is than in the published recipe, in each round and their median, and the
    share of an iteration's pairs that is above the threshold, by side."""
    rounds = {name: ratios(sides["published"], side) for name, side in sides.items() if name != "published"}
    return {
        "faster_per_prompt": {name: statistics.median(each) for name, each in rounds.items()},
        "rounds": rounds,
        "kept": {name: side.pairs / side.possible_pairs for name, side in sides.items()},
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
    for threshold, at in record.get("thresholds", {}).items():  # files of before have none
        times = lambda side, at=at: with_spread(at["rounds"][side]) if side in at["rounds"] else "1"
        lines.append(f"| faster per prompt at {threshold} | " + " | ".join(map(times, sides)) + " |")
        lines.append(f"| pairs kept at {threshold} | " + " | ".join(f"{at['kept'][side]:.0%}" for side in sides) + " |")
    return "\n".join(lines)


def with_spread(rounds: Sequence[float]) -> str:
    """Returns the median of the rounds' ratios, and in percent how far the farthest round is from it."""
    middle = statistics.median(rounds)
    spread = max(abs(each / middle - 1) for each in rounds)
    return f"{middle:.2f}x (±{spread:.0%})" if len(rounds) > 1 else f"{middle:.2f}x"


def cell(seconds: float, share: float | None) -> str:
    return f"{seconds:.3g} ({share:.0%})" if share else f"{seconds:.3g}"


if __name__ == "__main__":
    main()
