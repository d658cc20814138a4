"""The run folder: whether a run may begin or go on there, decided before anything is loaded or written, and its lock.

Nothing in it is ever overwritten but by the run that it belongs to. What a checkpoint holds, checkpoint.py knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from ..config.find import load
from ..config.settings import differences, dumped
from ..config.training import Config
from ..errors import UserError
from .checkpoint import CONFIG, DRAFT, Recipe, damage, finished, remove_drafts, state_of
from .digests import input_digests
from .files import write_atomically, writing
from .lock import LOCK, lock
from .ranks import Ranks, on_first

MAY_CHANGE = (  # on resume; everything else decides what the run computes
    "run.dir",
    "run.iterations",
    "run.device",
    "run.kernels",
    "run.log_every",
    "run.tracker",
    "run.save_every",
    "run.keep",
    "run.resume",
    "run.rank_timeout",
    "run.share_of_peak",
    "evaluate.prompts",
    "evaluate.num_steps",
    "evaluate.guidance",
    "evaluate.batch",
    "evaluate.seed",
    "evaluate.pictures",
    "evaluate.scorers",
    "evaluate.every",
    "evaluate.watched",
    "evaluate.patience",
    "evaluate.stop",
    "audit.path",
    "audit.revision",
    "audit.components",
    "audit.kind",
    "audit.guidance",
    "audit.dtype",
    "audit.every",
    "audit.prompts",
    "data.cache",
    "data.workers",
    "data.max_broken",
)
LEFTOVERS = {  # all that a run may leave that was ended before its first checkpoint
    LOCK,
    CONFIG,
    "config.yaml.draft",
    "metrics.jsonl",
    "metrics.jsonl.draft",
    "broken.txt",
    "checkpoints",
    "samples",
    "tensorboard",
    "wandb",
}
Inputs = Mapping[str, Path | str]  # by key: files on this machine, or else a text that says which they are


class RunFolder:
    """The folder of a run, of which one process at a time may have the lock; only the first rank touches it.

    checkpoint: the one from which the run goes on, None for a new run; known from `check` on.
    """

    def __init__(self, config: Recipe, ranks: Ranks, inputs: Inputs):
        """inputs: what the run reads, by the configuration's keys; it is compared by content and not by path."""
        self.config, self.ranks, self.inputs = config, ranks, inputs
        self.dir = Path(config.run.dir)
        self.checkpoint: Path | None = None
        self.digests: dict[str, dict[str, str] | str] = {}  # of the inputs, on the first rank from `open` on
        self._lock: TextIO | None = None

    def check(self) -> None:
        """Finds the checkpoint to go on from. Raises UserError, on every rank, if the run can neither begin nor go on.

        Nothing is written, but that a run which goes on has the lock from here on.
        """
        self.checkpoint = on_first(self.ranks, self._check)

    def open(self) -> None:
        """Makes the folder, locks it and writes config.yaml. Raises UserError as `check` does."""
        on_first(self.ranks, self._open)

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock:
            self._lock.close()

    def _check(self) -> Path | None:
        resume = self.config.run.resume
        try:
            found = {path.name for path in self.dir.iterdir()} if self.dir.exists() else set()
        except OSError as error:
            raise self._unusable("used", error) from None
        if resume and finished(self.dir):
            self._take_lock()
            return self._going_on()
        if resume and resume != "auto":
            raise UserError(f"run.resume: {self.dir} holds no checkpoint; run.resume=auto begins a run there")
        only_leftovers = found <= LEFTOVERS and not self._checkpoints_of_others()
        if found - {LOCK} and not (only_leftovers and resume == "auto"):
            way_out = "run.resume=true to go on with the run in it" if finished(self.dir) else ""
            way_out = way_out or ("run.resume=auto to begin the run in it anew" if only_leftovers else "")
            raise UserError(f"run.dir: {self.dir} is not empty; choose a new folder{way_out and ', or ' + way_out}")
        return None

    def _open(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if not self._lock:
                self._take_lock()
                self._check_again()
            self.digests = self.digests or self._digests()
            remove_drafts(self.dir)
            write_atomically(self.dir / CONFIG, dumped(self.config))
        except OSError as error:
            raise self._unusable("written", error) from None

    def _check_again(self) -> None:
        """Notices a run that began in the folder, or even ended, while this one was loading its models."""
        if self._check() is not None:
            raise UserError(f"run.dir: another run has begun in {self.dir} meanwhile; start this one again")

    def _take_lock(self) -> None:
        try:
            self._lock = lock(self.dir)
        except OSError as error:
            raise self._unusable("written", error) from None

    def _unusable(self, verb: str, error: OSError) -> UserError:
        return UserError(f"run.dir: {self.dir} cannot be {verb} ({error.strerror}); choose another folder")

    def _checkpoints_of_others(self) -> bool:
        """Whether checkpoints/ holds anything but drafts."""
        folder = self.dir / "checkpoints"
        return folder.exists() and not all(DRAFT.fullmatch(path.name) for path in folder.iterdir())

    def _going_on(self) -> Path:
        checkpoint = self._whole()
        self._compare_configuration(checkpoint)
        state = state_of(checkpoint)
        if state["ranks"] != self.ranks.size:
            raise UserError(
                f"run.resume: found {self.ranks.size} processes, expected {state['ranks']}, as {checkpoint} was "
                f"written by; start {state['ranks']}"
            )
        if state["iteration"] > self.config.iterations:
            key = "run.iterations" if isinstance(self.config, Config) else "optim.steps"
            raise UserError(
                f"{key}: found {self.config.iterations}, but {checkpoint} has done {state['iteration']}; expected at "
                "least as many"
            )
        self._compare_inputs(checkpoint, state.get("inputs", {}))
        return checkpoint

    def _whole(self) -> Path:
        """Returns the newest checkpoint, or by run.resume=newest_whole the newest that is not damaged."""
        *older, newest = finished(self.dir)
        fault = damage(newest)
        if not fault:
            return newest
        whole = next((checkpoint for checkpoint in reversed(older) if not damage(checkpoint)), None)
        if whole is None:
            raise UserError(f"run.resume: {newest} is damaged ({fault}), and none before it is whole; begin a new run")
        if self.config.run.resume != "newest_whole":
            raise UserError(
                f"run.resume: {newest} is damaged ({fault}); the newest whole checkpoint is {whole}, from which "
                "run.resume=newest_whole goes on"
            )
        return whole

    def _compare_configuration(self, checkpoint: Path) -> None:
        split = isinstance(self.config, Config) and not self.config.prompts.heldout  # evaluate.prompts then decides
        may_change = [key for key in MAY_CHANGE if not (split and key == "evaluate.prompts")]
        by_content = [*self.inputs, *state_of(checkpoint).get("inputs", {})]
        before = load(checkpoint / CONFIG, cls=type(self.config))
        changed = differences(before, self.config, [*may_change, *by_content])
        if changed:
            raise UserError(
                f"run.resume: {checkpoint} belongs to another configuration ({'; '.join(changed)}); "
                "set these keys back or begin a new run"
            )

    def _compare_inputs(self, checkpoint: Path, before: Mapping[str, dict[str, str] | str]) -> None:
        self.digests = self._digests()
        for key in sorted({*before, *self.digests}):
            old, new = before.get(key), self.digests.get(key)
            if old == new:
                continue
            named = sorted(n for n in {*old, *new} if old.get(n) != new.get(n)) if _both_files(old, new) else []
            file = f" in {named[0]}" if named and named[0] else ""
            raise UserError(
                f"{key}: {self.inputs.get(key, 'null')} differs{file} from what {checkpoint} was trained with"
                f"{_named(old)}; set it back or begin a new run"
            )

    def _digests(self) -> dict[str, dict[str, str] | str]:
        with writing(self.dir):
            return {key: v if isinstance(v, str) else input_digests(v) for key, v in self.inputs.items()}


def _both_files(old: dict | str | None, new: dict | str | None) -> bool:
    return isinstance(old, dict) and isinstance(new, dict)


def _named(old: dict | str | None) -> str:
    """Returns the text that stood for an input, in brackets; nothing for files."""
    return f" ({old})" if isinstance(old, str) else ""
