"""What a person sees of a judge's training: lines on the terminal, broken.txt, summary.json and the closing table."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch

from ..config.judge_training import SpmConfig
from ..data.pair_sets import PairSets
from ..judge.heldout import TIMESTEPS
from ..judge.model import StepAwarePreferenceModel
from ..runtime.metrics import finite, read_records, write_atomically
from ..runtime.optimizer import LocalAdamW, ZeroAdamW
from ..runtime.progress import duration
from ..runtime.ranks import Ranks
from .tables import ledger_rows

NAMED = 3  # broken pairs that the terminal and the summary name; broken.txt has all


def announce(config: SpmConfig, sets: PairSets) -> None:
    """Says what there is to train on, writes broken.txt where pairs are broken, and heads the columns of the lines."""
    print(f"{len(sets.train):,} training pairs, {len(sets.heldout):,} held-out pairs, {sets.left_out:,} rows left out")
    if sets.broken:
        path = Path(config.run.dir) / "broken.txt"
        path.write_text("".join(f"{line}\n" for line in sets.broken), encoding="utf-8")
        print(f"{len(sets.broken):,} broken pairs left out, named in {path}, such as {sets.broken[0]}")
    heading = "".join(f"{f't={t}':>7}" for t in TIMESTEPS)
    print(f"{'step':>11}{'pairs/s':>9}{'ETA':>9}{'loss':>8}{'accuracy':>10}   held-out:{heading}", flush=True)


def progress_line(record: dict, steps: int) -> str:
    """One line for a record: a dash where nothing was measured, held-out accuracies only where they are new."""
    forms = {"prompts_per_second": "{:.1f}", "eta_seconds": None, "loss": "{:.4f}", "accuracy": "{:.3f}"}
    cells = [f"{record['iteration']}/{steps}".rjust(11)]
    for (name, form), width in zip(forms.items(), (9, 9, 8, 10), strict=True):
        value = record.get(name)
        cells.append(("-" if value is None else form.format(value) if form else duration(value)).rjust(width))
    heldout = record.get("heldout_accuracy") or {}
    if any(value is not None for value in heldout.values()):
        cells.append(" " * 12 + accuracy_cells(heldout))
    return "".join(cells)


def accuracy_cells(heldout: dict[str, float | None]) -> str:
    """Held-out accuracies in columns of 7."""
    return "".join(("-" if value is None else f"{value:.3f}").rjust(7) for value in heldout.values())


def close(
    config: SpmConfig,
    sets: PairSets,
    judge: StepAwarePreferenceModel,
    optimizer: LocalAdamW | ZeroAdamW,
    ranks: Ranks,
    seconds: dict[str, float],
    ledger: dict | str,
) -> None:
    """Writes summary.json and prints the closing table. seconds: by stage and in total. ledger: its figures."""
    run_dir = Path(config.run.dir)
    records = read_records(run_dir / "metrics.jsonl")
    before, after = records[0], records[-1]
    accuracy = {"before": before["heldout_accuracy"], "after": after["heldout_accuracy"]}
    paths = {"judge": str(run_dir / "judge"), "summary": str(run_dir / "summary.json"), "run": str(run_dir)}
    summary = {
        "accuracy": accuracy,
        "loss": after["loss"],
        "seconds": seconds,
        "ledger": ledger,
        "optimizer_steps": optimizer.steps,
        "pairs": after["pairs"],
        "training_pairs": len(sets.train),
        "heldout_pairs": len(sets.heldout),
        "left_out_rows": sets.left_out,
        "broken_pairs": {"count": len(sets.broken), "such_as": sets.broken[:NAMED]},
        "parameters": sum(p.numel() for p in judge.clip.parameters()),
        "optimizer_state_bytes_per_rank": optimizer.state_bytes(),
        "world_size": ranks.size,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "seed": config.run.seed,
        "version": version("strop"),
        "paths": paths,
    }
    write_atomically(run_dir / "summary.json", json.dumps(finite(summary), indent=2) + "\n")
    heading = "".join(f"{f't={t}':>7}" for t in TIMESTEPS)
    print(f"\n{f'accuracy on {len(sets.heldout)} held-out pairs, ties left out':<52}{heading}")
    for name, row in accuracy.items():
        print(f"{name:<52}{accuracy_cells(row)}")
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    print(f"\n{seconds['total']:.0f} seconds ({stages}), {after['pairs']:,} pairs")
    print("\n".join(f"{label:<16}{value}" for label, value in ledger_rows(summary)))
    print("\n".join(f"{name:<10}{path}" for name, path in paths.items()))
