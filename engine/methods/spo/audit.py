"""Audits a judge: an auditor, a second judge, scores some of the branches that the judge has scored.

How far the two agree is Kendall's tau. A judge that is cheap, or that the policy learns to please, may lose touch with
what it was trained for; its own scores do not show that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...judge.candidates import Candidates, Judge
from ...models.conditioning import Conditioning
from ..protocol import finite_mean


@dataclass(frozen=True, slots=True)
class Audit:
    """Stands in for a judge in one rollout: its scores are the judge's, beside which the auditor scores some prompts.

    prompts: how many of the first prompts are audited, at every fork. clock: times the audit. The auditor draws
    nothing and leaves the candidates as they are, so that the rollout has the same bits as without.
    """

    judge: Judge
    auditor: Judge
    prompts: int
    clock: Callable[[str], AbstractContextManager] = nullcontext
    taus: list[Tensor] = field(default_factory=list)

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Returns the judge's scores (K, B), and adds to `taus` the agreement on the audited prompts."""
        scores, some = self.judge.score(candidates, cond), slice(self.prompts)
        with self.clock("rollout/audit"):
            audited = self.auditor.score(candidates.first(self.prompts), replace(cond[some], judge=cond.auditor[some]))
        self.taus.append(kendall_tau(scores[:, some], audited))
        return scores

    def agreement(self) -> tuple[Tensor, Tensor]:
        """Returns the mean tau over the forks of the audited prompts, and over how many, those that have one."""
        taus = torch.cat(self.taus)
        return finite_mean(taus), taus.isfinite().sum()


def kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Returns Kendall's tau-b (B,) of scores a and b (K, B) over the K branches of each of B prompts.

    It is 1 where both order all branches alike and -1 where one order is the other's reverse; of a pair that either has
    tied, nothing is counted but the tie. It is NaN where all of a or all of b are tied, or one is not finite.
    """
    one, other = torch.triu_indices(len(a), len(a), offset=1, device=a.device)
    order_a, order_b = (torch.sign(scores[one] - scores[other]) for scores in (a, b))  # (K * (K - 1) / 2, B)
    tau = (order_a * order_b).sum(0) / (order_a.abs().sum(0) * order_b.abs().sum(0)).sqrt()
    return tau.where(a.isfinite().all(0) & b.isfinite().all(0), math.nan)
