"""SPO, step-by-step preference optimization (arXiv 2406.04314), as a method of the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from ...config.methods.spo import SPOConfig
from ...data.embeddings import TrainingPrompts
from ...errors import UserError
from ...models.conditioning import Conditioning
from ...models.tiny_decoder import load_decoder
from ...runtime.checkpoint import last_checkpoint
from ...runtime.columns import UNSCORED, Column
from ...runtime.ranks import gather_rows
from ...runtime.session import Session
from ..models import Models
from ..protocol import Measured, Method
from .audit import Audit
from .columns import AGREEMENT, COLUMNS
from .pairs import PreferencePairs, balance
from .rollout import Rollout, check_steps, judged_segments
from .thresholds import given_thresholds, keeping_thresholds, threshold_line
from .update import Learner, MicroBatch

MEASURED = 32  # prompts whose pairs rollout.keep looks at, or more


@dataclass(frozen=True, slots=True)
class Collected:
    """The preference pairs of one rank's rollout, and the conditioning of its prompts."""

    iteration: int
    pairs: PreferencePairs
    cond: Conditioning


def build_rollout(config: SPOConfig, models: Models) -> Rollout:
    """Builds the rollout of a recipe. Raises UserError where its steps or its decoder do not fit the models."""
    schedule = models.schedule(config.rollout)
    check_steps(config.rollout, schedule)
    decoder = load_decoder(config.rollout.decoder, config.model.dtype, models.diffusion)
    return Rollout(models.policy, decoder, models.judge, schedule, config.rollout)


class SPO(Method):
    """SPO rolls out, has the judge tell winners from losers, and trains the policy to prefer the winners."""

    stage = "rollout"
    columns: Sequence[Column] = COLUMNS

    def __init__(self, config: SPOConfig, models: Models, prompts: TrainingPrompts, session: Session):
        self.config, self.policy, self.prompts, self.ranks = config, models.policy, prompts, session.ranks
        self.counted, self.run_dir = session.live.counted, session.dir
        self.rollout = replace(build_rollout(config, models), clock=session.clock, counted=self.counted)
        schedule = self.rollout.schedule
        self.learner = Learner(models.policy, schedule, config.optim)
        self.trainable = models.trainable
        models.diffusion.release_text_encoders()
        device, seed = session.ranks.device, config.run.seed
        self.rngs = {  # prior, branches and choices are each rank's own; the shuffle is the same on all
            "rollout": torch.Generator(device).manual_seed(seed + session.ranks.rank),
            "shuffle": torch.Generator(device).manual_seed(seed),
        }
        self.auditor, self.clock = models.auditor, session.clock
        timesteps = schedule.t[:-1]
        self.columns = [replace(c, labels=timesteps) if c.name == "pairs_per_t" else c for c in self.columns]
        self.columns += [AGREEMENT] if self.auditor else []
        self.judged = judged_segments(schedule, config.rollout)
        self.judged_steps = sum(map(len, self.judged))
        thresholds, self.said = given_thresholds(config.rollout, schedule), ""
        if config.rollout.keep is not None:
            with session.clock(self.stage):
                thresholds, pairs = self.thresholds()
            self.said = threshold_line(thresholds, self.judged, config.rollout.keep, pairs)
        self.rollout = replace(self.rollout, thresholds=thresholds)
        self.threshold = fmean(thresholds[segment.start] for segment in self.judged)
        most = config.iterations * self.learner.batch_count(config.rollout.prompts * self.judged_steps)
        if config.optim.accumulate > most:
            raise UserError(
                f"optim.accumulate: found {config.optim.accumulate}, expected at most {most}, the micro-batches of the "
                "whole run; with more, no optimizer step is made and nothing is learned"
            )

    def thresholds(self) -> tuple[list[float], int]:
        """Returns thresholds that keep rollout.keep of the policy's pairs, and of how many pairs, over all ranks.

        It is called while the policy is still the base model, so that a run that goes on finds the same.
        """
        rollout, ranks = self.config.rollout, self.ranks
        rng = torch.Generator(ranks.device).manual_seed(self.config.run.seed + ranks.rank)
        count = min(math.ceil(MEASURED / (rollout.prompts * ranks.size)), self.config.iterations)
        gaps = []
        for iteration in range(count):
            with self.policy.sampling(self.prompts.mine(iteration), rollout.text_kv) as cond:
                gaps.append(self.rollout(cond, rng).gaps)
        gaps = gather_rows(torch.cat(gaps, dim=1).T.contiguous(), ranks).T  # (S, N)
        steps = self.rollout.schedule.num_steps
        return keeping_thresholds(gaps, self.judged, rollout.keep, rollout.keep_by_timestep, steps), gaps.numel()

    def audit(self, iteration: int) -> Audit | None:
        """Returns what takes the judge's place in an iteration that is audited, None for one that is not."""
        config = self.config.audit
        if not self.auditor or iteration % config.every:
            return None
        return Audit(self.rollout.judge, self.auditor, config.prompts, self.clock)

    def learning_rate(self, iteration: int) -> float:
        """Returns the learning rate, which is constant, as published."""
        return self.config.optim.lr

    def collect(self, iteration: int) -> tuple[Collected, Measured]:
        """Returns the rollout of this rank's prompts, and its facts by the names of columns.

        Raises UserError if no pair of any rank has finite scores.
        """
        if self.said and self.ranks.first:
            print(self.said, flush=True)
            self.said = ""
        cond, audit = self.prompts.mine(iteration), self.audit(iteration)
        rollout = replace(self.rollout, judge=audit) if audit else self.rollout
        with self.policy.sampling(cond, self.config.rollout.text_kv) as sampling_cond:
            outcome = rollout(sampling_cond, self.rngs["rollout"])
        unscored, possible = int(outcome.unscored), len(cond) * self.judged_steps  # one wait an iteration
        everywhere = gather_rows(torch.tensor([[unscored, possible]], device=self.ranks.device), self.ranks).sum(0)
        if unscored == possible and everywhere[0] == everywhere[1]:
            raise UserError(
                f"iteration {iteration + 1}: the judge's scores are all NaN or infinite; try a smaller optim.lr, a "
                f"model.dtype of more range, or another judge.path; {last_checkpoint(self.run_dir)}"
            )
        facts = {
            "prompts": len(cond),
            "pairs": len(outcome.pairs),
            "pairs_per_t": outcome.pairs_per_step,
            "judge": outcome.score,
            "kept": outcome.pairs_per_step.sum() / possible,
            "threshold": self.threshold,
            UNSCORED.name: unscored,
            **({AGREEMENT.name: audit.agreement()} if audit else {}),
        }
        return Collected(iteration, outcome.pairs, cond), facts

    def batches(self, rows: Collected) -> Iterator[MicroBatch]:
        """Yields the micro-batches of all passes over this rank's part of all ranks' pairs."""
        pairs = balance(rows.pairs, len(rows.cond), self.ranks, self.rngs["shuffle"])
        cond = rows.cond if self.ranks.size == 1 else self.prompts.everyone(rows.iteration)
        batches = self.learner.batches(pairs, cond, self.rngs["shuffle"])
        return self.counted(batches, self.learner.batch_count(len(pairs)), "update")

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Measured]:
        """Returns the SPO loss of a micro-batch and its stats, as `Learner.loss` does."""
        return self.learner.loss(batch)
