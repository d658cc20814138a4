"""Training of the judge: `python engine/train_judge.py RECIPE [key=value ...]`, or with `deepspeed`.

Makes a step-aware preference model of a PickScore (SPO, arXiv 2406.04314, section 3.2): every pair of images is shown
as the base model sees it at a random timestep, and all of the CLIP learns to tell the preferred one.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ..kernels import use_reference
from .config.judge_training import SpmConfig
from .config.training import load
from .data.pair_sets import PairSets, check_labeller, choose, make_sets
from .errors import exit_on_user_error
from .judge.heldout import TIMESTEPS, View, evaluate, heldout_views
from .judge.model import StepAwarePreferenceModel
from .judge.training import (
    Denoiser,
    example_weights,
    labels_of,
    learning_rate,
    preference_loss,
    preference_scores,
    shares,
    training_pixels,
)
from .models.base_model import load_unet, quiet_libraries
from .models.conditioning import Conditioning
from .models.latent_diffusion import LatentDiffusion
from .report.judge_training import announce, close, progress_line
from .runtime import checkpoint
from .runtime import optimizer as zero
from .runtime.ledger import REASONS, Ledger, figures
from .runtime.metrics import Metrics, RunTime, Stopwatch
from .runtime.ranks import Ranks, start
from .speed.apply import prepare

EVALUATIONS = 5  # in the course of a run, the last one at its end
CHECKPOINTS = 2  # that stay: each holds the judge and its optimizer state, 12 GB for PickScore
JUDGE_FILE = "judge.safetensors"  # in a checkpoint


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a run is made of, loaded and checked. nothing: the conditioning of the empty prompt."""

    judge: StepAwarePreferenceModel
    denoiser: Denoiser
    nothing: Conditioning
    sets: PairSets
    views: list[View]
    optimizer: zero.LocalAdamW | zero.ZeroAdamW


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Trains a judge by a recipe; the last lines on the terminal say what came out and where it lies."""
    parser = argparse.ArgumentParser(prog="train_judge.py", description=main.__doc__)
    parser.add_argument("recipe", help="YAML file, such as configs/judge_sd15.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.dir=runs/judge optim.lr=1e-5")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    quiet_libraries()
    config = load(args.recipe, args.overrides, SpmConfig)
    use_reference(config.run.kernels == "reference")
    ranks = start(config.run.device)
    clock = Stopwatch(ranks.device)
    checkpoint.check_run(config, ranks)
    with Ledger(ranks.device) as ledger:
        parts = build(config, ranks, clock)
        resumed = checkpoint.open_run(config, ranks)
        ledger.before = checkpoint.ledger_before(resumed)
        spent = RunTime(clock, begun, checkpoint.seconds_before(resumed))
        train(config, parts, ranks, clock, spent, ledger, resumed)
    totals = ledger.totals()
    if ranks.first:
        parts.judge.save(Path(config.run.dir) / "judge")
        close(config, parts.sets, parts.judge, parts.optimizer, ranks, spent(), figures(totals))


def build(config: SpmConfig, ranks: Ranks, clock: Stopwatch) -> Parts:
    """Loads and checks all parts, and makes what is made once. Nothing but the cache is written.

    Raises UserError for whatever the user has to mend.
    """
    model, optim, seed = config.model, config.optim, config.run.seed
    with clock("load"):
        chosen = choose(config, ranks)
        diffusion = LatentDiffusion.load(model, ranks.device)
        judge = StepAwarePreferenceModel.load(config.judge, ranks.device, torch.Generator().manual_seed(seed))
        check_labeller(config, judge)
        denoiser = Denoiser(diffusion, load_unet(model, ranks.device), optim.guidance)
        prepare(model, denoiser.unet, diffusion.vae, judge.clip)
    with clock("prepare"):
        sets = make_sets(config, chosen, denoiser, judge, ranks)
        views = heldout_views(config, sets.heldout, denoiser, judge, ranks)
        nothing = diffusion.encode([""])
        if sets.kept:
            denoiser.release_encoders()
    judge.clip.requires_grad_(True).train()
    settings = zero.AdamWSettings(
        optim.lr,
        (0.9, 0.999),
        1e-8,
        optim.weight_decay,
        optim.max_grad_norm,
        optim.accumulate,
        optim.batch,
        config.zero.stage,
    )
    return Parts(judge, denoiser, nothing, sets, views, zero.build(judge.clip, settings, ranks))


def train(
    config: SpmConfig,
    parts: Parts,
    ranks: Ranks,
    clock: Stopwatch,
    spent: RunTime,
    ledger: Ledger,
    resumed: Path | None,
) -> None:
    """The loop: show a batch, update the judge; log, evaluate and save now and then.

    spent: gives the seconds of the run so far, by stage. resumed: the checkpoint to go on from.
    """
    run, optim, optimizer = config.run, config.optim, parts.optimizer
    rng = torch.Generator(ranks.device).manual_seed(run.seed + ranks.rank)
    begin = restore(resumed, parts, rng, ranks) if resumed else 0
    batches = shares(len(parts.sets.train), optim.batch, optim.steps * optim.accumulate, run.seed, ranks)
    batches = islice(batches, begin * optim.accumulate, None)
    loader = iter(DataLoader(parts.sets.train, batch_sampler=batches, num_workers=config.data.workers))
    labels = {"heldout_accuracy": TIMESTEPS, "throttled": REASONS}
    metrics = Metrics(run.dir, ranks.device, ranks.first, start=begin, iterations=optim.steps, labels=labels)
    due = {round(optim.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    if ranks.first:
        announce(config, parts.sets)
    if begin == 0:
        report(0, config, parts, ranks, clock, ledger, metrics, evaluated=True)
    for step in range(begin, optim.steps):
        optimizer.set_lr(learning_rate(step, optim.steps, optim.warmup, optim.lr, optim.warmup_shape))
        for batch_number in range(step * optim.accumulate, (step + 1) * optim.accumulate):
            batch, clean = next(loader), clean_pairs(batch_number, config)
            with clock("show"):
                pixels, t = show(batch, clean, parts, ranks, rng)
            with clock("update"):
                update(batch, pixels, t, config, parts, ranks, metrics)
        done = step + 1
        if done in due or done % run.log_every == 0:
            report(done, config, parts, ranks, clock, ledger, metrics, evaluated=done in due)
        if done % run.save_every == 0 and done < optim.steps:
            with clock("save"):
                save(config, done, parts, rng, ranks, spent(), ledger.totals())
    metrics.close()


def show(batch: dict, clean: int, parts: Parts, ranks: Ranks, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the judge sees of a batch: normalised pixels (2, N, 3, S, S) and timesteps t (N,).

    The first `clean` pairs of the (shuffled) batch are shown as they are, at t = 0; each other one as the base model
    sees it at t ~ U{0..999}, the same for both its images.
    """
    t = torch.randint(parts.denoiser.timesteps, (len(batch["caption"]),), generator=rng, device=ranks.device)
    t[:clean] = 0
    seen = [training_pixels(parts.judge, images_of(batch, slice(clean), ranks))] if clean else []
    if clean < len(t):
        mean, std, cond = known(batch, slice(clean, None), parts, ranks)
        seen.append(training_pixels(parts.judge, parts.denoiser.show(mean, std, cond, t[clean:], rng)))
    return torch.cat(seen, dim=1), t


def known(batch: dict, rows: slice, parts: Parts, ranks: Ranks) -> tuple[Tensor, Tensor, Conditioning]:
    """The VAE's mean and std (2, N, C, h, w) and the conditioning of rows of a batch, from the cache or made here."""
    diffusion, nothing = parts.denoiser.diffusion, parts.nothing
    if not parts.sets.kept:
        posterior = parts.denoiser.posterior(images_of(batch, rows, ranks))
        return *posterior, diffusion.encode(batch["caption"][rows])
    given = {
        name: batch[name][rows].to(ranks.device, nothing.text.dtype) for name in ("text", "pooled") if name in batch
    }
    mean, std = (batch[name][rows].transpose(0, 1).to(ranks.device, diffusion.vae.dtype) for name in ("mean", "std"))
    return mean, std, replace(nothing, **given)


def update(
    batch: dict, pixels: Tensor, t: Tensor, config: SpmConfig, parts: Parts, ranks: Ranks, metrics: Metrics
) -> None:
    """One forward and backward pass of the judge on what `show` returned, and the optimizer's step where it is due."""
    labels = labels_of(batch, ranks.device)
    weights = example_weights(batch.get("num_examples", torch.ones(len(t))).to(ranks.device), ranks)
    with autocast(config, ranks):
        scores = preference_scores(parts.judge, pixels, parts.judge.encode(batch["caption"]), t)
    loss, stats = preference_loss(scores.float(), labels, weights)
    parts.optimizer.backward(loss)
    norm = parts.optimizer.step()
    metrics.add_total(prompts=len(t), pairs=len(t))
    metrics.add_mean(loss=stats["loss"])
    metrics.add_mean(stats["decided"], accuracy=stats["accuracy"])
    if norm is not None:
        metrics.add_mean(grad_norm=norm)


def report(
    done: int,
    config: SpmConfig,
    parts: Parts,
    ranks: Ranks,
    clock: Stopwatch,
    ledger: Ledger,
    metrics: Metrics,
    evaluated: bool,
) -> None:
    """Writes and prints the record after `done` steps, with the held-out accuracy where it is due."""
    if evaluated:
        with clock("evaluate"):
            evaluate(parts.judge, parts.views, lambda: autocast(config, ranks), ranks, metrics)
    ledger.add_to(metrics)
    record = metrics.flush(done, optimizer_steps=parts.optimizer.steps, seconds=clock.lap())
    if ranks.first:
        print(progress_line(record, config.optim.steps), flush=True)


def save(
    config: SpmConfig, done: int, parts: Parts, rng: torch.Generator, ranks: Ranks, seconds: dict, ledger: dict
) -> None:
    """A checkpoint after `done` steps; only the newest few stay."""

    def write(folder: Path) -> None:
        state = {name: value.contiguous() for name, value in parts.judge.clip.state_dict().items()}
        save_file(state, folder / JUDGE_FILE)

    checkpoint.save(write, config, done, parts.optimizer, {"show": rng}, ranks, seconds, ledger, keep=CHECKPOINTS)


def restore(folder: Path, parts: Parts, rng: torch.Generator, ranks: Ranks) -> int:
    """Puts everything back as `save` found it; returns the number of steps done."""

    def read(folder: Path) -> None:
        parts.judge.clip.load_state_dict(load_file(folder / JUDGE_FILE))

    return checkpoint.restore(read, folder, parts.optimizer, {"show": rng}, ranks)


def clean_pairs(batch_number: int, config: SpmConfig) -> int:
    """How many pairs of this batch are shown clean, so that the share is met over the batches."""
    each = config.optim.batch * config.optim.clean_share
    return int((batch_number + 1) * each) - int(batch_number * each)


def images_of(batch: dict, rows: slice, ranks: Ranks) -> Tensor:
    """(2, N, 3, H, W) in [-1, 1] on the device."""
    return torch.stack([batch["image_0"][rows], batch["image_1"][rows]]).to(ranks.device)


def autocast(config: SpmConfig, ranks: Ranks) -> torch.autocast:
    """The judge's weights are float32; its arithmetic is bfloat16 where model.dtype is a 16-bit type, as published."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.model.dtype != "float32")


if __name__ == "__main__":
    main()
