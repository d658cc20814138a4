"""Measures each approximation's quality and compute: `python -m strop.bench.tinyworld.frontier`.

It is run from the root of the repository. Every variant is a whole run of engine/train.py on one thread, for each seed,
with the keys below changed. Gains are those on held-out prompts, by the examiners of tinyworld. Compute is that of the
loop, rollouts and updates, without evaluation, loading, and the texts, which are encoded before the loop. A saving has
to beat the control, which spends less by having fewer prompts and nothing else.

Finished runs are not run again. bench/results/frontier_tinyworld.json and .png are written of all runs in the folder;
variants of which it has none stay in them as they were, relative to the exact recipe of their own time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from strop.bench import ours
from strop.bench.tinyworld.frontier_plot import plot
from strop.bench.tinyworld.runs import ROOT, flop_of, train
from strop.bench.tinyworld.runs import run_all as run_in_turn
from strop.engine.config.find import load
from strop.engine.config.settings import differences
from strop.engine.config.training import Config
from strop.engine.data.embeddings import Embeddings
from strop.engine.data.prompts import read_prompts
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.find import load_judge
from strop.engine.models.base_model import load_unet, quiet_libraries
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.run_folder import MAY_CHANGE

EXACT, FAST, LATENT, LATENT_FAST = (
    f"configs/tinyworld{name}.yaml" for name in ("", "_fast", "_latent", "_latent_fast")
)
SUREST = ("optim.keep_pairs=0.5", "optim.keep_by=surest", "optim.micro_batch=20")
TINY = "rollout.decoder=bench/tinyworld/weights/tiny_decoder"


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe to compare with the exact one; changes: keys that differ from the file's."""

    title: str
    changes: tuple[str, ...] = ()
    recipe: str = EXACT


# Gain follows the number of optimizer steps, so whatever leaves half of the pairs halves the batch too.
VARIANTS = {
    "exact": Variant("exact"),
    "control": Variant("half the prompts", ("rollout.prompts=5", "optim.micro_batch=20")),
    "recipe": Variant("fast recipe", (), FAST),
    "half": Variant("half the iterations", ("run.iterations=7",)),
    "num_steps": Variant("10 DDIM steps", ("rollout.num_steps=10", "optim.micro_batch=20")),
    "look_ahead": Variant("text look-ahead", ("rollout.look_ahead=text",)),
    "passes": Variant("two passes, half the iterations", ("optim.passes=2", "run.iterations=7")),
    "judge_every": Variant("every 2nd step judged", ("rollout.judge_every=2", "optim.micro_batch=20")),
    "keep_pairs": Variant("half of the pairs", ("optim.keep_pairs=0.5", "optim.micro_batch=20")),
    "decoder": Variant("tiny decoder", (TINY,)),
    "recipe_decoder": Variant("fast recipe, tiny decoder", (TINY,), FAST),
    "latent": Variant("latent judge", (), LATENT),
    "latent_text": Variant("latent judge, text update", ("optim.guided=text",), LATENT),
    "latent_unguided": Variant("latent judge, unguided update", ("optim.guided=false",), LATENT),
    "latent_surest": Variant("latent judge, surest pairs", SUREST, LATENT),
    "latent_recipe": Variant("latent fast recipe", (), LATENT_FAST),
}
# seconds: on one thread, from iterations timed separately; wall_seconds: of the run, with other programs beside it.
COLUMNS = ("quality", "alignment", "optimizer_steps", "flop", "seconds", "wall_seconds")


@dataclass(frozen=True, slots=True)
class Costs:
    """FLOP or seconds of a prompt's rollout, and of a pair in the policy (forward, backward) and in the reference."""

    prompt: float
    policy: float
    reference: float

    def of_run(self, prompts: int, pairs: int, passes: int) -> float:
        """Returns the cost of a run that rolls out `prompts` and trains on `pairs`."""
        return prompts * self.prompt + pairs * (passes * self.policy + self.reference)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Runs the missing runs, writes the record and the plot, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.tinyworld.frontier", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, from seed 42 on")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=tuple(VARIANTS), metavar="NAME", help="variants")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread")
    args = parser.parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)
    seeds = range(42, 42 + args.seeds)
    run_all([(name, seed) for name in VARIANTS if name in args.only for seed in seeds], args.out, args.jobs)
    measured = collect(args.out, seeds)
    target = ROOT / "bench" / "results" / "frontier_tinyworld.json"
    record = with_earlier(summarise(measured), target)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")
    plot(record, target.with_suffix(".png"))
    print(f"{table(record)}\n\n{target}\n{target.with_suffix('.png')}")


def collect(out: Path, seeds: Sequence[int]) -> dict[str, dict[int, dict[str, float]]]:
    """Returns variant -> seed -> COLUMNS of the finished runs."""
    measured = {}
    for name in VARIANTS:
        done = [folder(out, name, seed) for seed in seeds if finished(out, name, seed)]
        if done:
            cost = costs(name)
            measured[name] = {load(run / "config.yaml").run.seed: measure(run, cost) for run in done}
    return measured


def recipe(name: str, *more: str) -> Config:
    """Loads the configuration of a variant."""
    return load(VARIANTS[name].recipe, [*VARIANTS[name].changes, *more])


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}"


def finished(out: Path, name: str, seed: int) -> bool:
    """Whether this run is finished. Raises UserError where the folder has a run of another recipe."""
    run = folder(out, name, seed)
    if not (run / "summary.json").exists():
        return False
    ignored = [key for key in MAY_CHANGE if key != "run.iterations" and not key.startswith("evaluate.")]
    changed = differences(load(run / "config.yaml"), recipe(name, f"run.seed={seed}"), ignored)
    if changed:
        raise UserError(f"{run}: a run of another recipe ({changed[0]}); delete it, or choose another --out")
    return True


def run_all(runs: Sequence[tuple[str, int]], out: Path, jobs: int) -> None:
    """Trains every (variant, seed) that is not finished; prints after each how many minutes are left."""
    missing = [run for run in runs if not finished(out, *run)]
    run_in_turn([partial(run_one, *run, out) for run in missing], jobs)


def run_one(name: str, seed: int, out: Path) -> Path:
    """Trains a variant on one thread, after removing an interrupted run. Returns its folder."""
    variant = VARIANTS[name]
    return train(variant.recipe, [*variant.changes, f"run.seed={seed}"], folder(out, name, seed))


def costs(name: str) -> dict[str, Costs]:
    """Measures FLOP and seconds of a variant's prompts and pairs by running a few iterations of it."""
    once = ("rollout.threshold=0", "run.iterations=1", "optim.passes=1", "optim.keep_pairs=1.0", "optim.keep_by=random")
    config, cpu = recipe(name, *once), torch.device("cpu")
    diffusion, unet = LatentDiffusion.load(config.model, cpu), load_unet(config.model, cpu)
    models = ours.Ours(unet, diffusion, load_judge(config.judge, config.model, diffusion, unet), config)
    prompts = read_prompts(config.prompts.train, "prompts.train")[: config.rollout.prompts]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of a CPU would not be counted
        flop = iteration(models, prompts[:2], flop_of)
    timed = [astuple(iteration(models, prompts, seconds_of)) for _ in range(2)]
    return {"flop": flop, "seconds": Costs(*map(min, *timed))}


def iteration(models: ours.Ours, prompts: Sequence[str], measured: Callable) -> Costs:
    """Runs an iteration of engine/train.py in three parts; measured(part) returns (the part's result, its cost)."""
    rng = torch.Generator().manual_seed(models.config.run.seed)
    cond = Embeddings(models.diffusion, models.judge, [list(prompts)])[prompts]
    pairs, rolled = measured(lambda: ours.roll(models, cond, rng))
    pairs, referred = measured(lambda: models.learner.with_reference(pairs, cond))
    _, trained = measured(lambda: ours.learn(models, pairs, cond, rng))
    return Costs(rolled / len(prompts), trained / len(pairs), referred / len(pairs))


def seconds_of(work: Callable) -> tuple[Any, float]:
    """Returns the result of `work()` and the CPU seconds that this process spent on it."""
    begun = time.process_time()
    result = work()
    return result, time.process_time() - begun


def measure(run: Path, cost: dict[str, Costs]) -> dict[str, float]:
    """Returns COLUMNS of a finished run."""
    summary, optim = json.loads((run / "summary.json").read_text()), load(run / "config.yaml").optim
    so_far = [0, *(record["pairs"] for record in read_records(run / "metrics.jsonl"))]
    trained = sum(math.ceil(optim.keep_pairs * (now - before)) for before, now in pairwise(so_far))
    return {
        "quality": summary["quality"]["delta"],
        "alignment": summary["alignment"]["delta"],
        "optimizer_steps": summary["optimizer_steps"],
        **{name: each.of_run(summary["prompts"], trained, optim.passes) for name, each in cost.items()},
        "wall_seconds": summary["seconds"]["rollout"] + summary["seconds"]["update"],
    }


def summarise(measured: dict[str, dict[int, dict[str, float]]]) -> dict:
    """Returns the record by variant: values of each seed, their means, and both relative to the exact recipe's.

    measured: variant -> seed -> COLUMNS. Raises UserError if the exact recipe lacks one of the seeds.
    """
    exact, variants = measured.get("exact", {}), {}
    for name, runs in measured.items():
        if not runs.keys() <= exact.keys():
            raise UserError(f"{name} has seeds that the exact recipe has not; run that first, with --only exact")
        rows = {seed: row | relative(row, exact[seed]) for seed, row in runs.items()}
        means = mean(runs.values())
        variants[name] = {
            "title": VARIANTS[name].title,
            "recipe": VARIANTS[name].recipe,
            "changes": list(VARIANTS[name].changes),
            "mean": means | relative(means, mean([exact[seed] for seed in runs])),
            "seeds": rows,
        }
    machine = f"cpu, {os.cpu_count()} cores, 1 thread a run"
    return {"machine": machine, "torch": torch.__version__, "variants": variants}


def with_earlier(record: dict, file: Path) -> dict:
    """Returns the record with the variants of an earlier one, if the file is there, that this one has not."""
    earlier = json.loads(file.read_text())["variants"] if file.exists() else {}
    both = earlier | record["variants"]
    return record | {"variants": {name: both[name] for name in VARIANTS if name in both}}


def relative(row: dict[str, float], exact: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns {"relative": a row's gain and costs over those of the exact recipe}."""
    return {"relative": {name: round(row[name] / exact[name], 4) for name in ("quality", "flop", "seconds")}}


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {column: float(f"{fmean(row[column] for row in rows):.5g}") for column in COLUMNS}


def table(record: dict) -> str:
    """Writes the means by variant as a table of Markdown, the quality of each seed in brackets."""
    head = "| variant | optimizer steps | quality | of the exact | alignment | FLOP | seconds |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for variant in record["variants"].values():
        row, seeds = variant["mean"], variant["seeds"].values()
        each = " ".join(f"{seed['quality']:.3f}" for seed in seeds)
        relative_row = row["relative"]
        lines.append(
            f"| {variant['title']} | {row['optimizer_steps']:.0f} | {row['quality']:+.3f} ({each}) | "
            f"{relative_row['quality']:.2f} | {row['alignment']:+.3f} | {relative_row['flop']:.2f} | "
            f"{relative_row['seconds']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
