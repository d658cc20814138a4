"""Evaluates a judge: builds the parts, draws and finishes pools of siblings, prints how often the winner is better.

evaluate_judge.py is its command.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .config.methods.spo import SPOConfig
from .config.settings import varied
from .data.embeddings import Embeddings
from .evaluation.pools import Pools, share, spread, won
from .evaluation.progress import Progress
from .methods.models import Models
from .methods.spo.method import build_rollout
from .methods.spo.rollout import judged_segments
from .models.base_model import quiet_libraries
from .runtime.output import table, write_all
from .runtime.ranks import start
from .scorers.find import load_scorer
from .training import prompts_of

ALL = "all"  # timesteps together
CHANGES = {"rollout.pair": "best_worst", "rollout.next_state": "random", "audit.path": None, "audit.every": None}


def run(config: SPOConfig, steps: int, out: Path | None) -> None:
    """Evaluates the judge of a recipe at `steps` of its steps; prints a table, and writes the figures to `out`."""
    quiet_libraries()
    figures = measured(config, steps)
    print(text(figures, config.judge.path))
    if out:
        write_all({out: json.dumps(figures, indent=2)})
        print(f"\nfigures   {out}")


@torch.no_grad()
def measured(config: SPOConfig, steps: int) -> dict[str, dict[str, dict]]:
    """Returns by score, then by timestep and ALL, the share of pools in which the judge's winner ends as the better."""
    config, ranks = varied(config, CHANGES), start(config.run.device)
    _, prompts = prompts_of(config, ranks)
    models = Models.load(config, ranks.device)
    scorers = {spec: load_scorer(spec, "evaluate.scorers", ranks.device) for spec in config.evaluate.scorers}
    embeddings = Embeddings(models.diffusion, models.judge, [prompts])
    models.diffusion.release_text_encoders()
    models.judge.release_text_tower()
    rollout = build_rollout(config, models)
    finish = models.diffusion.schedule(config.rollout.num_steps, 0.0, config.rollout.guidance)
    pools = Pools(rollout, models.diffusion, finish, spread(judged_segments(rollout.schedule, config.rollout), steps))
    rng = torch.Generator(ranks.device).manual_seed(config.run.seed)
    parts: dict[str, dict[str, list]] = {}
    count = -(-len(prompts) // config.rollout.prompts) * len(pools.segments)
    with Progress(True).stage("judging and finishing pools", count, "batches") as done:
        for begin in range(0, len(prompts), config.rollout.prompts):
            some = prompts[begin : begin + config.rollout.prompts]
            with models.policy.reference(), models.policy.sampling(embeddings[some], config.rollout.text_kv) as cond:
                for segment, images in pools(cond, rng):
                    for name, values in won(scorers, images, some).items():
                        by_timestep = parts.setdefault(name, {})
                        by_timestep.setdefault(str(rollout.schedule.t[segment.stop]), []).append(values)
                    done(1)
    for by_timestep in parts.values():
        by_timestep[ALL] = [value for values in list(by_timestep.values()) for value in values]
    return {name: {t: share(torch.cat(v)) for t, v in by_timestep.items()} for name, by_timestep in parts.items()}


def text(figures: dict[str, dict[str, dict]], judge: str) -> str:
    """Returns the figures as text: a row for each timestep, a column for each score."""
    cell = lambda share: "{:.0%} ({:.0%} to {:.0%})".format(share["share"], *share["ci95"])
    timesteps, *_ = figures.values()
    rows = [(t, *(cell(by_timestep[t]) for by_timestep in figures.values())) for t in timesteps]
    pools = timesteps[ALL]["pools"]
    head = f"Share of {pools:,} pools in which what {judge} picks ends above what it rejects, with 95% intervals"
    return "\n".join(["", head, *table(("t", *figures), rows)])
