"""SPO post-training: `python engine/train.py RECIPE [key=value ...]`, with several ranks `deepspeed engine/train.py`.

The whole of it on one page: build the parts, evaluate the base model, run the loop of `train`, evaluate, report.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"

import argparse
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from ..kernels import use_reference
from .config.factory import resolve
from .config.training import Config, load
from .data.embeddings import Embeddings
from .data.prompts import batch_of, first_used, read_prompts, split_prompts
from .errors import UserError, exit_on_user_error
from .evaluation.evaluator import Evaluation, Evaluator
from .judge.model import StepAwarePreferenceModel
from .methods.spo.pairs import balance
from .methods.spo.rollout import check_steps, forking_steps, judged_segments, rollout
from .methods.spo.update import learn
from .models.base_model import load_unet, quiet_libraries
from .models.latent_diffusion import BATCH, LatentDiffusion
from .models.lora_file import facts, write
from .models.policy import Policy
from .models.tiny_decoder import TinyDecoder
from .plan.peak import seconds_at_peak
from .report.pictures import before_after
from .report.run_folder import make_report, paired_delta, write_summary
from .report.tables import closing_table
from .runtime import checkpoint
from .runtime import optimizer as zero
from .runtime.ledger import REASONS, Ledger, figures
from .runtime.metrics import Metrics, RunTime, Stopwatch, read_records
from .runtime.progress import Progress
from .runtime.ranks import Ranks, start
from .schedules.ddim import DDIMSchedule
from .speed.apply import prepare


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a run is made of, loaded and checked."""

    prompts: list[str]
    heldout: list[str]
    policy: Policy
    diffusion: LatentDiffusion
    decoder: LatentDiffusion | TinyDecoder
    judge: StepAwarePreferenceModel
    embeddings: Embeddings
    schedule: DDIMSchedule
    evaluator: Evaluator
    optimizer: zero.LocalAdamW | zero.ZeroAdamW


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Trains by a recipe; the last lines on the terminal say what came out and where it lies."""
    parser = argparse.ArgumentParser(prog="train.py", description=main.__doc__)
    parser.add_argument("recipe", help="YAML file, such as configs/tinyworld.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.dir=runs/mine optim.lr=1e-4")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args(argv)
    quiet_libraries()
    config = load(args.recipe, args.overrides)
    use_reference(config.run.kernels == "reference")
    ranks = start(config.run.device)
    clock = Stopwatch(ranks.device)
    checkpoint.check_run(config, ranks)
    with Ledger(ranks.device) as ledger:
        begun = time.perf_counter()
        with clock("load"):
            parts = build(config, ranks)
            resumed = checkpoint.open_run(config, ranks, parts.policy.check_lora)
            ledger.at_peak = seconds_at_peak(config, parts.policy.family, ranks.device)
        ledger.before = checkpoint.ledger_before(resumed)
        spent = RunTime(clock, begun, checkpoint.seconds_before(resumed))
        with clock("evaluate"):
            base = evaluate_base(parts)
        train(config, parts, ranks, clock, spent, ledger, resumed)
        with clock("evaluate"):
            tuned = parts.evaluator(parts.policy, "tuned model")
    totals = ledger.totals()
    if ranks.first:
        close(config, parts, ranks, base, tuned, spent(), figures(totals))


def build(config: Config, ranks: Ranks) -> Parts:
    """Loads and checks all parts. Raises UserError for whatever the user has to mend, before anything is written."""
    prompts, heldout = prompts_of(config, ranks)
    model, device, lora = config.model, ranks.device, config.lora
    diffusion = LatentDiffusion.load(model, device)
    unet, shape = load_unet(model, device), diffusion.latent_shape
    savings = model.unet_rows, model.merges_lora, model.share_halves
    policy = Policy(unet, lora.rank, lora.target_modules, config.run.seed, shape, *savings)
    judge = StepAwarePreferenceModel.load(config.judge, device)
    spec = config.evaluate.examiner
    examine = resolve(spec, "evaluate.examiner")(device) if spec else None
    schedule = diffusion.schedule(config.rollout.num_steps, config.rollout.eta, config.rollout.guidance)
    check_steps(config.rollout, schedule)
    tiny = config.rollout.decoder
    decoder = TinyDecoder.load(tiny, model.dtype, diffusion) if tiny else diffusion
    prepare(model, policy.unet, diffusion.vae, judge.clip)
    policy.multiple = config.optim.micro_batch if model.compile else 1
    used = config.run.iterations * config.rollout.prompts * ranks.size
    trained = first_used(prompts, used, config.run.seed, BATCH)
    embeddings = Embeddings(diffusion, judge, [trained, heldout])
    diffusion.release_text_encoders()
    judge.release_text_tower()
    return Parts(
        prompts,
        heldout,
        policy,
        diffusion,
        decoder,
        judge,
        embeddings,
        schedule,
        Evaluator(diffusion, judge, examine, embeddings, heldout, config.evaluate, ranks, config.rollout.text_kv),
        zero.build(policy.unet, zero.AdamWSettings.of(config.optim, config.zero.stage, model.dtype), ranks),
    )


def prompts_of(config: Config, ranks: Ranks) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts). Raises UserError where they overlap or do not suffice."""
    prompts = read_prompts(config.prompts.train, "prompts.train")
    count = config.evaluate.prompts
    if config.prompts.heldout is None:
        most, where = len(set(prompts)) - 1, f"held out of the prompts in {config.prompts.train}"
        prompts, heldout = split_prompts(prompts, min(count, most), config.run.seed)
    else:
        heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        most, where = len(heldout), f"the prompts in {config.prompts.heldout}"
    if not ranks.size <= count <= most:
        raise UserError(f"evaluate.prompts: found {count}, expected {ranks.size} (the processes) to {most} ({where})")
    both = set(prompts) & set(heldout)
    if both:
        raise UserError(f"prompts.heldout: {len(both)} prompts are training prompts too, such as {min(both)!r}")
    return prompts, heldout[:count]


def evaluate_base(parts: Parts) -> Evaluation:
    """Before anything is trained, so that whatever the examiner cannot do shows at once."""
    with parts.policy.reference():
        return parts.evaluator(parts.policy, "base model")


def train(
    config: Config,
    parts: Parts,
    ranks: Ranks,
    clock: Stopwatch,
    spent: RunTime,
    ledger: Ledger,
    resumed: Path | None,
) -> None:
    """The loop: roll out, balance, update; log and save now and then. Leaves the last checkpoint and run.dir/lora."""
    run, policy, optimizer = config.run, parts.policy, parts.optimizer
    rngs = {  # prior, branches and choices are each rank's own; the shuffle is the same on all
        "rollout": torch.Generator(ranks.device).manual_seed(run.seed + ranks.rank),
        "shuffle": torch.Generator(ranks.device).manual_seed(run.seed),
    }
    done = checkpoint.restore(policy.load_lora, resumed, optimizer, rngs, ranks) if resumed else 0
    labels = {"pairs_per_t": parts.schedule.t[:-1], "throttled": REASONS}
    metrics = Metrics(run.dir, ranks.device, ranks.first, start=done, iterations=run.iterations, labels=labels)
    progress = Progress(run.iterations)
    forks = forking_steps(parts.schedule, config.rollout)
    judged_steps = sum(map(len, judged_segments(parts.schedule, config.rollout)))
    clock.lap()
    for iteration in range(done, run.iterations):
        prompts = share_of(parts.prompts, iteration, config.rollout.prompts, run.seed, ranks)
        with clock("rollout"):
            cond = parts.embeddings[prompts]
            with policy.sampling(cond, config.rollout.text_kv) as known:
                result = rollout(
                    policy, parts.decoder, parts.judge, parts.schedule, known, config.rollout, rngs["rollout"], clock
                )
        with clock("update"):
            pairs = balance(result.pairs, len(prompts), ranks, rngs["shuffle"])
            if ranks.size > 1:  # pairs of any rank's prompts
                cond = parts.embeddings[batch_of(parts.prompts, iteration, len(prompts) * ranks.size, run.seed)]
            learn(pairs, forks, cond, policy, parts.schedule, optimizer, config.optim, rngs["shuffle"], metrics)
        ledger.work(len(prompts), len(pairs))
        possible = len(prompts) * judged_steps
        metrics.add_total(prompts=len(prompts), pairs=len(result.pairs))
        metrics.add_sum(pairs_per_t=result.kept)
        metrics.add_mean(judge=result.score, kept=result.kept.sum() / possible)
        last = iteration + 1 == run.iterations
        if last or (iteration + 1) % run.log_every == 0:
            seconds = clock.lap()
            ledger.add_to(metrics, seconds["rollout"] + seconds["update"])
            record = metrics.flush(iteration + 1, optimizer_steps=optimizer.steps, seconds=seconds)
            if ranks.first:
                progress.show(record)
        if last or (iteration + 1) % run.save_every == 0:
            with clock("save"):
                about = facts(config, policy.family, iteration + 1)
                write_lora = functools.partial(policy.save_lora, facts=about)
                checkpoint.save(write_lora, config, iteration + 1, optimizer, rngs, ranks, spent(), ledger.totals())
    metrics.close()


def share_of(prompts: list[str], iteration: int, size: int, seed: int, ranks: Ranks) -> list[str]:
    """This rank's `size` prompts of an iteration."""
    everyone = batch_of(prompts, iteration, size * ranks.size, seed)
    return everyone[ranks.rank * size : (ranks.rank + 1) * size]


def close(
    config: Config,
    parts: Parts,
    ranks: Ranks,
    base: Evaluation,
    tuned: Evaluation,
    seconds: dict[str, float],
    ledger: dict | str,
) -> None:
    """Writes the LoRA, summary.json, before_after.png, curves.png and report.html, and prints the closing table."""
    run_dir = Path(config.run.dir)
    about = facts(config, parts.policy.family, config.run.iterations)
    lora = parts.policy.save_lora(run_dir / "lora", about)
    kohya = run_dir / "lora" / f"{run_dir.resolve().name}_kohya.safetensors"
    write(parts.policy.lora(about), kohya, "kohya")
    before_after(base.images, tuned.images, parts.heldout[: len(base.images)], run_dir / "before_after.png")
    last = read_records(run_dir / "metrics.jsonl")[-1]
    summary = {name: paired_delta(base.scores[name], tuned.scores[name]) for name in base.scores} | {
        "seconds": seconds,
        "ledger": ledger,
        "family": parts.policy.family.name,
        "iterations": config.run.iterations,
        "prompts": last["prompts"],
        "prompts_per_second": last["prompts"] / (seconds["rollout"] + seconds["update"]),
        "pairs": last["pairs"],
        "optimizer_steps": parts.optimizer.steps,
        "optimizer_state_bytes_per_rank": parts.optimizer.state_bytes(),
        "heldout_prompts": len(parts.heldout),
        "world_size": ranks.size,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "seed": config.run.seed,
        "version": version("strop"),
        "paths": {
            "run": str(run_dir),
            "report": str(run_dir / "report.html"),
            "lora": str(lora),
            "lora_kohya": str(kohya),
            "checkpoints": str(run_dir / "checkpoints"),
        },
    }
    write_summary(run_dir, summary)
    make_report(run_dir)
    print(f"\n{closing_table(summary)}")


if __name__ == "__main__":
    main()
