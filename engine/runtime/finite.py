"""Keeps NaN and infinity out of what is trained.

A micro-batch whose loss is not finite is left out: its gradient counts as zero, on its rank alone, and the ranks
exchange what they always do. An optimizer step is left out if its gradient is not finite, or if none of its
micro-batches was. That is one rule for every type and number of ranks; what overflows in float16 is no exception.
diagnosis.py ends a run in which it happens again and again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks


class Gate:
    """Lets the gradients of finite losses through to the parameters, divided by the scale of the backward pass.

    counts (2,): micro-batches left out and others since the last optimizer step, on this rank until one is due.
    left_out: micro-batches of the last optimizer step, on all ranks, whose loss was not finite; in_a_row: optimizer
    steps left out since the last one that was taken. All is decided on the device until a step is due: the host then
    waits for the gradient's norm, once. It would hand the device no more work before that step anyway, and what it has
    handed over already, the backward pass, takes far longer than the first kernels of the next forward pass are late.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], scale: float, ranks: Ranks):
        self._scale, self._several = scale, ranks.size > 1
        self.counts = torch.zeros(2, device=parameters[0].device)  # micro-batches left out, and others
        self.left_out = self.in_a_row = 0
        for p in parameters:
            p.register_hook(self._passed)

    def judge(self, loss: Tensor, last: bool) -> Tensor:
        """Takes a loss before its backward pass; last: of an optimizer step. Returns whether it is finite, () bool.

        If no loss of the step was finite, on any rank, the gradient becomes NaN, so that the step is left out.
        """
        self._finite = loss.detach().isfinite()
        self.counts += torch.stack([~self._finite, self._finite])
        if last and self._several:
            dist.all_reduce(self.counts)
        self._instead = torch.where(self.counts[1] > 0, 0.0, math.nan) if last else torch.zeros_like(self.counts[1])
        return self._finite

    def open(self) -> None:
        """Lets sums of gradients that were let through before pass once more, as they are."""
        self._finite = torch.ones_like(self._finite)

    def admits(self, norm: Tensor | float) -> bool:
        """Takes the norm of the gradient of an optimizer step, the same on every rank; returns if it is finite."""
        norm, left_out = torch.stack([torch.as_tensor(norm).to(self.counts), self.counts[0]]).tolist()  # one wait
        self.counts.zero_()
        self.left_out = int(left_out)
        self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
        return not self.in_a_row

    def _passed(self, grad: Tensor) -> Tensor:
        grad = grad / self._scale if self._scale != 1 else grad
        return torch.where(self._finite, grad, self._instead)
