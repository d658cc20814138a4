"""One scale for more than two systems: Bradley-Terry with Davidson's ties, by maximum likelihood."""

from __future__ import annotations

from itertools import combinations

import numpy as np


def davidson(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Returns the strengths (S,), in log units around 0, and the tie parameter nu of S systems.

    wins[i, j]: how often i was preferred over j; ties[i, j] = ties[j, i]: how often neither was. With p =
    exp(strength), i beats j with probability p_i / (p_i + p_j + nu sqrt(p_i p_j)), and they tie with nu sqrt(p_i p_j)
    over the same (Davidson, 1970). None where the estimate is infinite: some systems never lost to the others (Ford,
    1957), or no answer took a side.
    """
    if not wins.any() or not _connected((wins + ties) > 0):
        return None
    systems, with_ties = len(wins), bool(ties.any())
    features, counts = [], []
    for i, j in combinations(range(systems), 2):
        rows = np.zeros((3, systems + 1))  # i wins, j wins, tie; the last column is log nu
        rows[0, i] = rows[1, j] = rows[2, -1] = 1
        rows[2, [i, j]] = 0.5
        features.append(rows[: 2 + with_ties, : systems + with_ties])
        counts.append([wins[i, j], wins[j, i], ties[i, j]][: 2 + with_ties])
    weights = _fit(np.stack(features), np.array(counts, dtype=np.float64))
    strengths = weights[:systems] - weights[:systems].mean()
    return strengths, float(np.exp(weights[-1])) if with_ties else 0.0


def _fit(features: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Newton's method for a multinomial logit: features (Q, O, D), counts (Q, O), weights (D,); concave."""

    def likelihood(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = features @ weights
        logs = scores - scores.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        return float((counts * logs).sum()), np.exp(logs)

    weights = np.zeros(features.shape[-1])
    value, chances = likelihood(weights)
    for _ in range(100):
        total = counts.sum(1, keepdims=True)
        gradient = np.einsum("qo,qod->d", counts - total * chances, features)
        means = np.einsum("qo,qod->qd", chances, features)[:, None]
        curvature = np.einsum("qo,qod,qoe->de", total * chances, features - means, features - means)
        step = np.linalg.lstsq(curvature, gradient, rcond=1e-10)[0]  # the sum of the strengths is free
        while (ahead := likelihood(weights + step))[0] < value and np.abs(step).max() > 1e-12:
            step = step / 2
        weights, (value, chances) = weights + step, ahead
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _connected(beats: np.ndarray) -> bool:
    """Whether every system is reached from every other along beats[i, j]."""
    reached = np.eye(len(beats), dtype=bool) | beats
    for _ in range(len(beats)):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    return bool(reached.all())
