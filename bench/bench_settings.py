"""Measures what the speed keys are worth on this machine: `python -m strop.bench.bench_settings sd15`, or tinyworld.

An iteration of the recipe is timed as it stands, with one key changed at a time, and once more as it stands, whose
distance from the first is the noise of the others. Every variant has networks of its own, at full size with random
weights where they are not on this machine. The record has seconds by stage, peak memory, and the first iteration, which
compiles where there is something to compile.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from strop.bench import ours
from strop.bench.machine import machine, start_bench, write
from strop.bench.sides import STAGES, Side, build, gigabytes, medians, time_one
from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.models.base_model import quiet_libraries
from strop.engine.runtime.stopwatch import Stopwatch

ROOT = Path(__file__).parents[1]
BASE, AGAIN = "as it stands", "as it stands, again"
SETTINGS = (
    "run.kernels=reference",
    "model.channels_last=true",
    "model.fold_upsample=false",
    "model.merge_lora=true",
    "model.share_halves=false",
    "model.compile=judge_and_decoder",
)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times a recipe with one speed key changed at a time."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.bench_settings", description=main.__doc__)
    parser.add_argument("recipe", help="tinyworld, sd15 or sdxl: of configs/, NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all, such as rollout.prompts=4")
    parser.add_argument(
        "--only", nargs="+", choices=SETTINGS, default=SETTINGS, metavar="SETTING", help="of these keys"
    )
    parser.add_argument("--rounds", type=int, default=2, help="timed iterations of each, at least 1")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the machine's in bench/results/)")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    if args.rounds < 1:
        raise UserError(f"--rounds: found {args.rounds}, expected 1 or more")
    overrides = [*args.overrides, "rollout.threshold=0"]
    config = load(ROOT / "configs" / f"{args.recipe}.yaml", overrides)
    device = start_bench("bench_settings", config)
    record = {"recipe": args.recipe, "machine": machine(device), "torch": torch.__version__, "settings": {}}
    record |= {"overrides": args.overrides, "rounds": args.rounds}
    named = f"settings-{args.recipe}"
    for name in (BASE, *args.only, AGAIN):
        changed = [] if name in (BASE, AGAIN) else [name]
        config = load(ROOT / "configs" / f"{args.recipe}.yaml", [*overrides, *changed])
        record["settings"][name] = measured = measure(config, args.rounds, device)
        target = write(record, named, args.out)
        print(f"{name}: {measured['seconds']['total']:.3g} s", flush=True)
    print(f"\n{table(record)}\n\nwritten to {target}")


def measure(config: SPOConfig, rounds: int, device: torch.device) -> dict:
    """Returns the medians of `rounds` iterations after a first one: {"first", "seconds" by stage, "peak_bytes"}."""
    side = Side(ours, build(ours.Ours, config, device), config)
    prompts = [f"prompt {i}" for i in range(config.rollout.prompts)]
    begun = time.perf_counter()
    side.run(prompts, Stopwatch(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - begun
    for _ in range(rounds):
        time_one(side, prompts, device)
    seconds, peak = medians(side), side.peak
    del side  # its networks, before the next are built
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"first": first, "seconds": seconds, "peak_bytes": peak}


def table(record: dict) -> str:
    """Returns the record as a table in Markdown."""
    stages = [stage for stage in STAGES if stage != "update/optimizer"]
    base = record["settings"][BASE]["seconds"]["total"]
    lines = [
        f"{record['recipe']} on {record['machine']}, PyTorch {record['torch']}: seconds of an iteration",
        "",
        f"| changed | {' | '.join(stage.split('/')[-1] for stage in stages)} | total | times as fast | peak | first |",
        "|---|" + "---|" * (len(stages) + 4),
    ]
    for name, one in record["settings"].items():
        cells = [f"{one['seconds'][stage]:.3g}" for stage in (*stages, "total")]
        cells.append(f"{base / one['seconds']['total']:.2f}")
        cells.append(gigabytes(one["peak_bytes"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {one['first']:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
