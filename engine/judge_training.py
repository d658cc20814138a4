"""Trains a judge: builds the parts, trains, reports.

A PickScore becomes a step-aware preference model, or a base model's encoder a latent judge, in the same loop as every
method. train_judge.py is its command.
"""

from __future__ import annotations

from pathlib import Path

from .config.judge_training import JudgeTrainingConfig
from .data.pair_files import is_factory
from .data.pair_scan import name_broken
from .data.pair_sets import PairSets, choose, make_sets
from .evaluation.compare import rate_delta
from .judge.find import begin_judge, load_labeller, save_judge
from .judge.views import views_of
from .methods.judge_training.method import JudgeTraining
from .methods.loop import train
from .models.base_model import quiet_libraries
from .models.hub import model_inputs
from .models.latent_diffusion import LatentDiffusion
from .plan.out_of_memory import memory_errors_explained
from .report.run_folder import close_run
from .runtime.metrics import read_records
from .runtime.optimizer import AdamWSettings, Optimizer, build_optimizer
from .runtime.run_folder import Inputs
from .runtime.session import Session
from .speed.apply import prepare

NAMED = 3  # broken pairs that the summary names; broken.txt has all


def run(config: JudgeTrainingConfig) -> None:
    """Trains a judge by a recipe; the last lines on the terminal give the results and the paths of the files."""
    quiet_libraries()
    with Session.start(config, inputs(config)) as session, memory_errors_explained(session):
        method, optimizer = build(session)
        session.open()
        if session.ranks.first:
            announce(session, method.sets)
        train(session, method, optimizer)
        summary = session.summary()
        if session.ranks.first:
            close(session, method, summary)


def build(session: Session) -> tuple[JudgeTraining, Optimizer]:
    """Loads and checks all parts; writes nothing but the cache.

    Raises UserError for whatever the user has to put right.
    """
    config, ranks = session.config, session.ranks
    model, optim = config.model, config.optim
    with session.clock("load"):
        chosen = choose(config, ranks)
        diffusion = LatentDiffusion.load(model, ranks.device)
        judge = begin_judge(config, diffusion)
        labeller = load_labeller(config, judge)
        views = views_of(config, judge, diffusion)
        prepare(model, views.unet, diffusion.vae, judge.network)
    with session.clock("prepare"):
        sets = make_sets(config, chosen, diffusion, labeller, ranks)
        method = JudgeTraining(config, judge, views, sets, session)
    settings = AdamWSettings(
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        accumulate=optim.accumulate,
        micro_batch=optim.batch,
        stage=config.zero.stage,
    )
    return method, build_optimizer(judge.network, settings, ranks)


def inputs(config: JudgeTrainingConfig) -> Inputs:
    """Returns what a run reads, by key: of pairs the lists and parquet files, not every image that a list names.

    Raises UserError if a model is not there.
    """
    pairs = {f"data.{name}": getattr(config.data, name) for name in ("source", "only", "heldout_source")}
    files = {k: v if is_factory(v) else Path(v) for k, v in pairs.items() if v}
    return model_inputs(config.model, config.judge) | files


def announce(session: Session, sets: PairSets) -> None:
    """Prints how many pairs there are, and names those that are broken."""
    filtered = f", {sets.filtered:,} by data.only" if session.config.data.only else ""
    left_out = f"{sets.left_out:,} rows left out{filtered}"
    print(f"{len(sets.train):,} training pairs, {len(sets.heldout):,} held-out pairs, {left_out}")
    name_broken(sets.broken, session.dir)


def close(session: Session, method: JudgeTraining, summary: dict) -> None:
    """Writes the judge and the report, and prints the closing table."""
    sets, network = method.sets, method.judge.network
    save_judge(method.judge, session.dir / "judge")
    records = read_records(session.metrics.path)
    before, after = records[0]["heldout_accuracy"], records[-1]["heldout_accuracy"]
    compared = {f"accuracy at t={t}": rate_delta(before[t], after[t], method.decided) for t in before or {}}
    more = {
        "accuracy": {"before": before, "after": after},
        "loss": records[-1]["loss"],
        "training_pairs": len(sets.train),
        "heldout_pairs": len(sets.heldout),
        "left_out_rows": sets.left_out,
        "filtered_pairs": sets.filtered,
        "broken_pairs": {"count": len(sets.broken), "such_as": sets.broken[:NAMED]},
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "paths": summary["paths"] | {"judge": str(session.dir / "judge")},
    }
    close_run(session.dir, compared | summary | more)
