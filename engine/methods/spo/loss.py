"""The SPO objective, a DPO loss on one denoising step: a pure function of log-ratios; no model, no schedule."""

import math

import torch.nn.functional as F
from torch import Tensor


def spo_loss(log_ratio: Tensor, beta: float, clip: float | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes -log sigmoid(beta * (log r_winner - log r_loser)), each r = p / p_ref clamped to [1 - clip, 1 + clip].

    log_ratio (2, N): log-density under the policy minus that under the reference, winner first. Returns the mean loss
    and, without gradient: `margin` (mean of beta * (log r_w - log r_l) before clamping), `accuracy` (share of pairs in
    which that is positive: the implicit reward prefers the winner; zero counts half) and `clipped` (share of the 2N
    ratios at or outside the clamp). clip None leaves the ratios free.
    Source: equation 7 of SPO (arXiv 2406.04314) with the published implementation's clamp.
    """
    low, high = (math.log1p(-clip), math.log1p(clip)) if clip is not None else (-math.inf, math.inf)
    margin = beta * (log_ratio.clamp(low, high)[0] - log_ratio.clamp(low, high)[1])
    loss = -F.logsigmoid(margin).mean()
    free = (log_ratio[0] - log_ratio[1]).detach()
    clipped = (log_ratio.detach() <= low) | (log_ratio.detach() >= high)
    stats = {
        "loss": loss.detach(),
        "margin": beta * free.mean(),
        "accuracy": 0.5 + 0.5 * free.sign().mean(),  # policy and reference start equal: one half, as of a coin
        "clipped": clipped.float().mean(),
    }
    return loss, stats
