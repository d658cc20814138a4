"""Runs a post-training: builds the parts, evaluates the base model, trains, evaluates, reports.

train.py is its command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config.training import Config
from .data.embeddings import Embeddings, TrainingPrompts
from .data.pair_files import is_factory
from .data.prompts import first_used, read_prompts, split_prompts
from .errors import UserError
from .evaluation.compare import paired_delta
from .evaluation.evaluator import Evaluation, Evaluator
from .evaluation.monitor import Monitor
from .methods.find import method_class
from .methods.loop import train
from .methods.models import Models
from .methods.protocol import Method
from .models.base_model import quiet_libraries
from .models.hub import model_inputs, source
from .models.latent_diffusion import BATCH
from .models.lora_file import write
from .models.policy import Policy
from .plan.out_of_memory import memory_errors_explained
from .plan.peak import seconds_at_peak
from .report.model_card import write_model_card
from .report.pictures import before_after
from .report.run_folder import close_run, read_run, write_heldout
from .runtime.checkpoint import Trainable, last_checkpoint
from .runtime.files import writing
from .runtime.optimizer import AdamWSettings, Optimizer, build_optimizer
from .runtime.ranks import Ranks
from .runtime.run_folder import Inputs
from .runtime.session import Session
from .scorers.find import load_scorer


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a run, loaded and checked."""

    models: Models
    method: Method
    optimizer: Optimizer
    evaluator: Evaluator


def run(config: Config) -> None:
    """Trains by a recipe; the last lines on the terminal give the results and the paths of the files."""
    quiet_libraries()
    with Session.start(config, inputs(config)) as session, memory_errors_explained(session):
        with session.clock("load"):
            parts = build(session)
            session.open()
            if session.ranks.first:
                announce(session, parts.models.policy)
            session.ledger.at_peak = seconds_at_peak(config, parts.models.policy.family, session.ranks.device)
        with session.clock("evaluate"), parts.models.policy.reference():
            base = parts.evaluator("base model")  # first, so that whatever a scorer cannot do shows at once
            check_scores(base, parts.evaluator.all_prompts)
        evaluate = config.evaluate
        monitor = Monitor(parts.evaluator, base, evaluate, session.dir) if evaluate.every else None
        train(session, parts.method, parts.optimizer, monitor)
        if monitor and monitor.stopped:
            go_back(session, parts.models.trainable, monitor.best)
        with session.clock("evaluate"):
            tuned = parts.evaluator("tuned model")
        if not any(values.isfinite().any() for values in tuned.scores.values()):
            raise UserError(f"the tuned model's scores are all NaN or infinite; {last_checkpoint(session.dir)}")
        summary = session.summary()
        summary["lora_iteration"] = monitor.best if monitor and monitor.stopped else session.done
        if session.ranks.first:
            close(config, parts, base, tuned, summary)


def build(session: Session) -> Parts:
    """Loads and checks all parts. Raises UserError for whatever the user has to put right, before writing anything."""
    config, ranks = session.config, session.ranks
    prompts, heldout = prompts_of(config, ranks)
    models = Models.load(config, ranks.device)
    scorers = [load_scorer(spec, "evaluate.scorers", ranks.device) for spec in config.evaluate.scorers]
    used = config.iterations * config.prompts_per_iteration * ranks.size
    trained = first_used(prompts, used, config.run.seed, BATCH)
    embeddings = Embeddings(models.diffusion, models.judge, [trained, heldout], models.auditor)
    training = TrainingPrompts(prompts, embeddings, config.prompts_per_iteration, config.run.seed, ranks)
    method = method_class(config)(config, models, training, session)
    for judge in filter(None, (models.judge, models.auditor)):
        judge.release_text_tower()
    optimizer = build_optimizer(models.policy.unet, AdamWSettings.of(config), ranks)
    return Parts(models, method, optimizer, Evaluator(models, scorers, embeddings, heldout, config, ranks))


def check_scores(base: Evaluation, prompts: list[str]) -> None:
    """Raises UserError that names a score which is not finite for the base model."""
    for name, values in base.scores.items():
        if bad := (~values.isfinite()).nonzero().flatten().tolist():
            key = "judge.path" if name == "judge" else "evaluate.scorers"
            raise UserError(
                f"{key}: the base model's score {name} is NaN or infinite for {len(bad)} of {len(values)} held-out "
                f"prompts, such as {prompts[bad[0]]!r}, expected finite ones; try another model.dtype, or leave it out"
            )


def inputs(config: Config) -> Inputs:
    """Returns what a run reads, by key. Raises UserError if a model is not there."""
    files = {key: path if is_factory(path) else Path(path) for key, path in config.files_read.items()}
    models = {key: source(path, None, key) for key, path in config.models_read.items()}
    return model_inputs(config.model, config.judge) | files | models


def go_back(session: Session, trainable: Trainable, iteration: int) -> None:
    """Puts what was trained back to a checkpoint of the run; as it is now, it goes to lora_last/."""
    if session.ranks.first:
        trainable.save(session.dir / "lora_last", session.done)
    trainable.load(session.dir / "checkpoints" / f"{iteration:06d}")


def prompts_of(config: Config, ranks: Ranks) -> tuple[list[str], list[str]]:
    """Returns (training prompts, held-out prompts). Raises UserError if they overlap or do not suffice.

    A method that draws no samples has no training prompts.
    """
    trained_on = config.files_read.get("prompts.train")
    prompts = read_prompts(trained_on, "prompts.train") if trained_on else []
    count = config.evaluate.prompts
    if config.prompts.heldout is None:
        most, where = len(set(prompts)) - 1, f"held out of the prompts in {trained_on}"
        prompts, heldout = split_prompts(prompts, min(count, most), config.run.seed)
    else:
        heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        most, where = len(heldout), f"the prompts in {config.prompts.heldout}"
    if not ranks.size <= count <= most:
        raise UserError(f"evaluate.prompts: found {count}, expected {ranks.size} (the processes) to {most} ({where})")
    both = set(prompts) & set(heldout)
    if both:
        raise UserError(f"prompts.heldout: remove the {len(both)} prompts that are trained on, such as {min(both)!r}")
    return prompts, heldout[:count]


def announce(session: Session, policy: Policy) -> None:
    """Says what is about to run, in lines of at most 80 characters: of a long path its end is shown."""
    config = session.config
    trained = sum(p.numel() for p in policy.unet.parameters() if p.requires_grad)
    facts = {
        "method": config.method,
        "model": f"{config.model.path}, {policy.family.name}",
        "judge": config.judge.path,
        "auditor": config.auditor.path if config.auditor else "",
        "LoRA": f"{trained:,} parameters, rank {config.lora.rank}, learning rate {config.optim.lr:g}",
        "run": config.in_words(session.ranks.size),
        "device": f"{session.device_name}, {config.model.dtype}",
        "folder": str(session.dir),
    }
    for name, fact in filter(all, facts.items()):
        print(f"{name:<10}{fact if len(fact) <= 70 else f'...{fact[-67:]}'}")
    print(flush=True)


def close(config: Config, parts: Parts, base: Evaluation, tuned: Evaluation, summary: dict) -> None:
    """Writes the LoRA in both formats, its model card, what was held out and the report; prints table and verdict."""
    run_dir, policy, heldout = Path(config.run.dir), parts.models.policy, parts.evaluator.all_prompts
    kohya = run_dir / "lora" / f"{run_dir.resolve().name}_kohya.safetensors"
    with writing(run_dir / "lora"):
        lora = parts.models.trainable.save(run_dir / "lora", summary["lora_iteration"])
        write(policy.lora(parts.models.trainable.facts(summary["lora_iteration"])), kohya, "kohya")
    with writing(run_dir / "before_after.png"):
        before_after(base.images, tuned.images, heldout[: len(base.images)], run_dir / "before_after.png")
    write_heldout(run_dir, heldout, base.scores, tuned.scores)
    compared = {name: paired_delta(base.scores[name], tuned.scores[name]) for name in base.scores}
    paths = summary["paths"] | {"lora": str(lora), "lora_kohya": str(kohya)}
    more = {"family": policy.family.name, "heldout_prompts": len(heldout), "paths": paths}
    more["rewards"] = sorted(parts.evaluator.rewards)
    close_run(run_dir, compared | summary | more)
    write_model_card(read_run(run_dir), run_dir / "lora")
