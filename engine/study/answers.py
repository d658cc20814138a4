"""Reads the files that raters save, and refuses those that are not of this study or do not say what they should."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..models.model_files import read_json
from .balance import DEGRADED, PAIR, REPEAT, SENTINEL, Item
from .key import Key

FORMAT = "strop-study-answers/1"
SIDES = ("left", "tie", "right")


@dataclass(frozen=True, slots=True)
class Vote:
    """What one rater said of one item: sides {question: "left", "tie" or "right"}, after `ms` milliseconds."""

    rater: str
    item: Item
    sides: dict[str, str]
    ms: float

    def chosen(self, question: str) -> int | None:
        """The system that was preferred, by its place (DEGRADED of a sentinel's twin), or None for a tie."""
        return {"left": self.item.left, "right": self.item.right, "tie": None}[self.sides[question]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The votes of all raters who handed in a file; raters in the order of the key."""

    raters: list[str]
    votes: list[Vote]

    def of_kind(self, *kinds: str) -> list[Vote]:
        """The votes on items of these kinds."""
        return [vote for vote in self.votes if vote.item.kind in kinds]

    def of_rater(self, rater: str) -> Answers:
        """The votes of one rater."""
        return Answers([rater], [vote for vote in self.votes if vote.rater == rater])

    def left(self, question: str) -> tuple[int, int]:
        """Returns how often the left image was chosen, and how often a side was; sentinels are left out."""
        sides = [vote.sides[question] for vote in self.of_kind(PAIR, REPEAT)]
        return sides.count("left"), len(sides) - sides.count("tie")

    def consistency(self, question: str) -> tuple[int, int]:
        """Returns how many repeats were answered as the first time, sides apart, and how many repeats there are."""
        first = {(vote.rater, vote.item.token): vote for vote in self.votes}
        again = [(first.get((vote.rater, vote.item.of)), vote) for vote in self.of_kind(REPEAT)]
        both = [(a.chosen(question), b.chosen(question)) for a, b in again if a is not None]
        return sum(a == b for a, b in both), len(both)

    def sentinels(self, questions: Iterable[str]) -> tuple[int, int]:
        """Returns how many sentinels were passed, and how many were answered.

        One is passed where all of `questions` were answered with the intact image.
        """
        votes = self.of_kind(SENTINEL)
        return sum(all(vote.chosen(q) not in (None, DEGRADED) for q in questions) for vote in votes), len(votes)

    def too_fast(self, limit_ms: float) -> int:
        """Returns how many items were answered in less than `limit_ms` milliseconds."""
        return sum(vote.ms < limit_ms for vote in self.votes)


def read_answers(key: Key, files: list[Path]) -> Answers:
    """Reads the files of the raters of one study.

    Raises UserError that names the file: not JSON, another study's, of a rater who is not in the key or handed in
    another file, or with answers that the page cannot have given.
    """
    sources, votes = {}, []
    for path in files:
        rater, given = _read(key, path)
        if rater in sources:
            raise UserError(
                f"{path}: found answers of {rater!r}, whose answers are in {sources[rater]} too; leave out one"
            )
        sources[rater] = path
        votes += given
    return Answers([rater for rater in key.items if rater in sources], votes)


def _read(key: Key, path: Path) -> tuple[str, list[Vote]]:
    content = read_json(path, "a file that a rater has saved")
    if content.get("format") != FORMAT:
        raise UserError(f'{path}: found no "format": "{FORMAT}", expected a file that a rater has saved')
    if content.get("manifest") != key.manifest:
        raise UserError(
            f"{path} is of another study: its manifest is {str(content.get('manifest'))[:12]}, expected "
            f"{key.manifest[:12]}; name the key.json that was made with its page"
        )
    rater, answers = content.get("rater"), content.get("answers")
    if not isinstance(rater, str) or rater not in key.items:
        raise UserError(f"{path}: found the rater {rater!r}, expected one of {', '.join(key.items)}")
    if not isinstance(answers, list):
        raise UserError(f"{path}: found no list of answers; ask {rater} to save the file again")
    votes = [_vote(key, rater, answer, f"{path}: answer {number}") for number, answer in enumerate(answers, start=1)]
    if len({vote.item.token for vote in votes}) < len(votes):
        raise UserError(f"{path}: found several answers to one pair, expected one; ask {rater} to save the file again")
    return rater, votes


def _vote(key: Key, rater: str, answer: object, where: str) -> Vote:
    answer = answer if isinstance(answer, dict) else {}
    item, sides, ms = key.items[rater].get(str(answer.get("id"))), answer.get("answers"), answer.get("ms")
    if item is None:
        raise UserError(f"{where}: found the pair {answer.get('id')!r}, which {rater} was not shown")
    whole = isinstance(sides, dict) and sides.keys() == key.questions.keys() and all(s in SIDES for s in sides.values())
    if not whole or not isinstance(ms, int | float) or isinstance(ms, bool) or not ms >= 0:
        raise UserError(
            f"{where}: found {str({'answers': sides, 'ms': ms})[:120]}, expected left, tie or right to "
            f"{', '.join(key.questions)}, and milliseconds from 0"
        )
    return Vote(rater, item, dict(sides), float(ms))
