"""What the answers of a study show, as one dictionary: counts, intervals, tests, agreement, the care of raters."""

from __future__ import annotations

from itertools import combinations
from statistics import median

import numpy as np

from ..evaluation.intervals import SURE, Resampling, binomial_p, bootstrap_p, corrected, percentiles, wilson
from .agreement import ordinal_alpha
from .answers import Answers
from .balance import PAIR
from .bradley_terry import davidson
from .key import Key

FORMAT = "strop-study-analysis/1"
ENOUGH = 30  # answers to a question about two systems, below which nothing is said
DRAWS = 4000
DRAWS_OF_STRENGTHS = 400  # each of which is a fit
SENTINEL_QUESTIONS = ("general", "appeal")  # a degraded image may still show what the text says
TOO_FEW = "too few to say"


def analyse(key: Key, answers: Answers) -> dict:
    """Returns what is written to analysis.json; docs/study.md says what each entry means.

    The bootstrap has a seed of its own, so that the same answers give the same numbers.
    """
    pairs = list(combinations(range(len(key.systems)), 2))
    cells = {(pair, q): _cells(key, answers, pair, q) for pair in pairs for q in key.questions}
    several = len(answers.raters) > 1
    size = len(answers.raters), len(key.prompts)
    resampling = Resampling.draw(*size, DRAWS, np.random.default_rng(0)) if several else None
    questions = list(key.questions)
    return {
        "format": FORMAT,
        "manifest": key.manifest,
        "systems": key.systems,
        "questions": key.questions,
        "prompts": len(key.prompts),
        "interval": "bootstrap over raters and prompts" if several else "Wilson",
        "draws": DRAWS if several else 0,
        "pairs": [_pair(key, pair, {q: cells[pair, q] for q in questions}, resampling) for pair in pairs],
        "strengths": {q: _strengths(key, {p: cells[p, q] for p in pairs}, resampling) for q in questions}
        if len(key.systems) > 2
        else None,
        "alpha": {q: ordinal_alpha(_ordinal([cells[pair, q] for pair in pairs])) for q in questions},
        "raters": {rater: _rater(key, answers.of_rater(rater)) for rater in answers.raters},
        "all_raters": _care(key, answers),
    }


def _cells(key: Key, answers: Answers, pair: tuple[int, int], question: str) -> np.ndarray:
    """Returns (3, R, P): whether the first system won, neither did, or the second did; nothing where none answered."""
    cells = np.zeros((3, len(answers.raters), len(key.prompts)))
    rows = {rater: row for row, rater in enumerate(answers.raters)}
    for vote in answers.of_kind(PAIR):
        if {vote.item.left, vote.item.right} == set(pair):
            outcome = {pair[0]: 0, None: 1, pair[1]: 2}[vote.chosen(question)]
            cells[outcome, rows[vote.rater], vote.item.prompt] = 1
    return cells


def _pair(key: Key, pair: tuple[int, int], cells: dict, resampling: Resampling | None) -> dict:
    questions = {question: _question(cells[question], resampling) for question in cells}
    for question, p in corrected(questions).items():
        row = questions[question]
        row["p_holm"] = p
        better = key.systems[pair[row["rate"] < 0.5]]
        row["verdict"] = f"{better} is preferred" if p < SURE else "no preference shown"
    return {"first": key.systems[pair[0]], "second": key.systems[pair[1]], "questions": questions}


def _question(cells: np.ndarray, resampling: Resampling | None) -> dict:
    """The row of one question: the win rate of the first system with ties counted half, and among decided answers."""
    win, tie, lose = (int(n) for n in cells.sum((1, 2)))
    count, decided = win + tie + lose, win + lose
    row = {"win": win, "tie": tie, "lose": lose, "answers": count}
    row["rate"] = (win + tie / 2) / count if count else None
    row["rate_decided"] = win / decided if decided else None
    row |= {"ci95": None, "ci95_decided": None, "p": None, "p_holm": None, "verdict": TOO_FEW}
    if count < ENOUGH:
        return row
    if resampling is None:
        row["ci95"], row["p"] = wilson(row["rate"], count), binomial_p(win, decided)
        row["ci95_decided"] = wilson(row["rate_decided"], decided) if decided >= ENOUGH else None
        return row
    with np.errstate(invalid="ignore", divide="ignore"):
        wins, ties, losses = resampling.totals(cells).T
        rates, among_decided = (wins + ties / 2) / (wins + ties + losses), wins / (wins + losses)
    row["ci95"], row["p"] = percentiles(rates), bootstrap_p(rates, 0.5)
    row["ci95_decided"] = percentiles(among_decided) if decided >= ENOUGH else None
    return row


def _ordinal(cells: list[np.ndarray]) -> np.ndarray:
    """Returns the answers (R, U) over all pairs of images: 1 first, 0 tie, -1 second, NaN for none."""
    every = np.concatenate(cells, axis=2)  # (3, R, U)
    return np.where(every.sum(0) > 0, every[0] - every[2], np.nan)


def _strengths(key: Key, cells: dict[tuple[int, int], np.ndarray], resampling: Resampling | None) -> dict | None:
    """The systems on one scale, with intervals where there are several raters; None where no estimate is finite."""
    fit = _davidson(len(key.systems), {pair: cell.sum((1, 2)) for pair, cell in cells.items()})
    if fit is None or min(cell.sum() for cell in cells.values()) < ENOUGH:
        return None
    intervals = [None] * len(key.systems)
    if resampling is not None:
        totals = {pair: resampling.totals(cell) for pair, cell in cells.items()}
        draws = ({pair: total[n] for pair, total in totals.items()} for n in range(DRAWS_OF_STRENGTHS))
        fits = [drawn for drawn in (_davidson(len(key.systems), draw) for draw in draws) if drawn is not None]
        if len(fits) >= 0.9 * DRAWS_OF_STRENGTHS:
            intervals = [percentiles(column) for column in np.array([strengths for strengths, _ in fits]).T]
    strengths = zip(key.systems, fit[0], intervals, strict=True)
    return {"nu": fit[1], "systems": {name: {"strength": float(s), "ci95": ci} for name, s, ci in strengths}}


def _davidson(systems: int, counts: dict[tuple[int, int], np.ndarray]) -> tuple[np.ndarray, float] | None:
    wins, ties = np.zeros((systems, systems)), np.zeros((systems, systems))
    for (i, j), (win, tie, lose) in counts.items():
        wins[i, j], wins[j, i], ties[i, j], ties[j, i] = win, lose, tie, tie
    return davidson(wins, ties)


def _rater(key: Key, answers: Answers) -> dict:
    shown = len(key.items[answers.raters[0]])
    times = [vote.ms / 1000 for vote in answers.votes]
    return {"shown": shown, "median_seconds": median(times) if times else None} | _care(key, answers)


def _care(key: Key, answers: Answers) -> dict:
    """How carefully was answered: sentinels, speed, repeats, and whether a side was favoured."""
    passed, sentinels = answers.sentinels(SENTINEL_QUESTIONS)
    left = {q: answers.left(q) for q in key.questions}
    same = {q: answers.consistency(q) for q in key.questions}
    return {
        "answered": len(answers.votes),
        "sentinels": {"passed": passed, "of": sentinels},
        "too_fast": {"count": answers.too_fast(key.too_fast_ms), "limit_seconds": key.too_fast_ms / 1000},
        "left": {
            q: {
                "left": hits,
                "of": n,
                "rate": hits / n if n else None,
                "p": binomial_p(hits, n) if n >= ENOUGH else None,
            }
            for q, (hits, n) in left.items()
        },
        "consistency": {q: {"same": hits, "of": n} for q, (hits, n) in same.items()},
    }
