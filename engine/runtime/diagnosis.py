"""Says what was left out because it was NaN or infinite, and ends a run that computes nothing else."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, warn
from .checkpoint import last_checkpoint
from .finite import Gate
from .optimizer import Optimizer

PATIENCE = 2  # optimizer steps in a row that are left out


class Diagnosis:
    """Says once that something was left out, and ends a run in which PATIENCE optimizer steps in a row were."""

    def __init__(self, gate: Gate, run_dir: Path, first: bool):
        """first: of the ranks, which warns."""
        self._gate, self._run_dir, self._first, self._silent = gate, run_dir, first, not first
        self._source, self._since = "", 0  # what was not finite first, and in which iteration

    def after_step(self, iteration: int, unscored: float) -> None:
        """Looks at the last optimizer step; iterations are counted from 1. unscored: pairs without a finite score.

        Raises UserError, on every rank, that names what was first not finite, the keys to turn and the last checkpoint.
        """
        gate = self._gate
        if not (gate.in_a_row or gate.left_out):
            self._source = ""
            return
        if not self._source:
            loss = "the loss" if gate.left_out else "the gradient (of a finite loss)"
            self._source, self._since = "the judge's scores" if unscored else loss, iteration
        if gate.in_a_row >= PATIENCE:
            raise UserError(
                f"iteration {iteration}: {PATIENCE} optimizer steps in a row were left out, for NaN or infinity, which "
                f"was first in {self._source} in iteration {self._since}; try a smaller optim.lr or "
                f"optim.max_grad_norm, or a model.dtype of more range; {last_checkpoint(self._run_dir)}"
            )
        if not self._silent:
            what = "an optimizer step" if gate.in_a_row else f"{gate.left_out} micro-batches"
            warn(
                f"iteration {iteration}: left out {what}, because NaN or infinity was found in {self._source}; this is "
                "said once, the column left_out of metrics.jsonl counts such micro-batches"
            )
            self._silent = True

    def after_first(self, optimizer: Optimizer, iterations: int) -> None:
        """Warns after the first iteration if at its pace the run ends without an optimizer step."""
        waiting, accumulate = optimizer.waiting, optimizer.settings.accumulate
        if self._first and not optimizer.steps and 0 < waiting * iterations < accumulate:
            warn(
                f"optim.accumulate: found {accumulate}, but the first iteration had {waiting} micro-batches: with "
                f"{iterations} like it no optimizer step is made, and nothing is learned; take a smaller number"
            )
