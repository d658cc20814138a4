"""The loss of a step-aware preference model on preference pairs, and how often it agrees with their labels.

Labels come with the data or from data/pair_scan.py. There are no in-batch negatives, which the published code has but
leaves switched off.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.ranks import Ranks
from .find import AnyJudge


def preference_scores(judge: AnyJudge, shown: Tensor, text: Tensor, t: Tensor) -> Tensor:
    """Scores both images of each pair in one forward, with gradients: (2, N).

    shown (2, N, ...): normalised pixels, or latents, as judge.compare takes them; text (N, E): judge.encode's; t (N,).
    """
    return judge.compare(shown.flatten(0, 1), text.repeat(2, 1), t.repeat(2)).view(2, -1)


def preference_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the weighted sum over pairs of KL(labels || softmax(scores)), whose minimum is 0, also for ties.

    scores, labels (2, N), labels of a pair sum to 1, a tie is 0.5 / 0.5; weights (N,), see `example_weights`. Returns
    the loss and, without gradient, `loss`, `accuracy` (of the pairs that are no ties) and `decided` (their number).
    Source: SPO (arXiv 2406.04314), section 3.2 and the published SPMCriterion, which adds log 0.5 to ties.
    """
    each = -(labels * scores.log_softmax(0)).sum(0) - torch.special.entr(labels).sum(0)  # (N,)
    loss = (weights * each).sum()
    right, decided = agreement(scores.detach(), labels)
    return loss, {"loss": loss.detach(), "accuracy": right / decided.clamp(min=1), "decided": decided}


def agreement(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Counts pairs whose preferred image scores higher, and pairs that are no ties. scores, labels (2, N)."""
    decided = labels[0] != labels[1]
    right = decided & ((scores[0] - scores[1]) * (labels[0] - labels[1]) > 0)
    return right.sum(), decided.sum()


def labels_of(batch: dict, device: torch.device) -> Tensor:
    """Stacks the labels of a batch of pairs: (2, N) float32."""
    return torch.stack([batch["label_0"], batch["label_1"]]).float().to(device)


def example_weights(num_examples: Tensor, ranks: Ranks) -> Tensor:
    """Computes 1 / num_examples of each pair (N,), divided by the sum over all ranks and multiplied by their number.

    num_examples: how many training pairs share the pair's prompt; so each prompt has the same weight in total.
    Gradients are averaged over the ranks, hence the factor: the mean of the ranks' losses is the weighted mean over
    all their pairs.
    """
    weights = num_examples.float().reciprocal()
    total = weights.sum()
    if ranks.size > 1:
        dist.all_reduce(total)
    return weights * ranks.size / total
