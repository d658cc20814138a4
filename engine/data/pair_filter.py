"""The file of `strop filter-pairs`, which says by the gaps of scores which pairs of a source are trained on.

It holds JSON lines: a head (which source, scorers and rule), one for each pair, in the order in which they were scored,
and a last one that says that all are there. scorers/pair_gaps.py computes the gaps; no images are copied.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.pairs import PairsConfig
from ..errors import UserError, one_line, short
from ..runtime.output import write_all
from ..user_files import read_text
from .json_lines import parsed

if TYPE_CHECKING:
    from .pair_files import PairSource

MADE_BY = "strop filter-pairs"
HEAD = {"made_by", "source", "pairs", "digest", "scorers", "gap", "tie_gap"}
MOST_BYTES = 2**30  # of a file; a line has about 90
DECIDED, TIES = "decided", "ties"


@dataclass(frozen=True, slots=True)
class Rule:
    """Which pairs are kept: bounds of gaps, by the names of scores.

    gap: of a pair that is no tie, the preferred image's score minus the other's must be larger. tie_gap: of a tie, the
    scores must differ by less.
    """

    gap: Mapping[str, float]
    tie_gap: Mapping[str, float]

    def check(self, names: Collection[str]) -> None:
        """Raises UserError where the rule needs a score that is not among the names."""
        for key, bounds in (("--gap", self.gap), ("--tie-gap", self.tie_gap)):
            if missing := [name for name in bounds if name not in names]:
                raise UserError(
                    f"{key}: found {missing[0]}, expected of the scores that --scorers gives, {', '.join(names)}"
                )

    def unmet(self, gaps: Mapping[str, float], kind: str) -> list[str]:
        """Returns the names of the scores for which a pair of a kind drops out; it is kept where there are none."""
        if kind == TIES:
            return [name for name, bound in self.tie_gap.items() if not abs(gaps[name]) < bound]
        return [name for name, bound in self.gap.items() if not gaps[name] > bound]

    def text(self, kind: str, name: str) -> str:
        """Writes the condition for a score, of pairs of a kind."""
        return f"|{name}| < {self.tie_gap[name]:g}" if kind == TIES else f"{name} > {self.gap[name]:g}"


LPO = Rule(  # arXiv 2502.01051, without its VQAScore; its 0.03 is of a cosine, and clip_score is 100 cosines
    {"aesthetic": -0.5, "clip_score": 0.0}, {"aesthetic": 0.2, "clip_score": 3.0}
)


class PairFilter:
    """A file that is being made: it grows by lines that are whole, and another start goes on with it.

    done: rows that have a line. seen, kept: how many pairs, by DECIDED and TIES; unmet: how many do not meet each
    condition, where a pair may count more than once. broken: "file row: why" of pairs that could not be scored.
    """

    def __init__(self, path: Path, spec: str, source: PairSource, scorers: Sequence[str], rule: Rule):
        """Reads what is there, and decides it anew where the rule has changed; nothing is written yet.

        spec: the source as a person names it. Raises UserError if something else is there.
        """
        self.path, self.source, self.rule = path, source, rule
        self.done: set[int] = set()
        self.seen, self.kept, self.unmet = Counter(), Counter(), Counter()
        self.broken: list[str] = []
        self.complete = False
        head = {"made_by": MADE_BY, "source": spec, "pairs": len(source), "digest": digest(source)}
        head |= {"scorers": list(scorers), "gap": dict(rule.gap), "tie_gap": dict(rule.tie_gap)}
        self._unwritten = _line(head)  # what is to stand above the next lines, "" where it does
        if path.exists():
            self._go_on(head)

    def add(self, entries: Iterable[dict]) -> None:
        """Decides and writes {"row", "gaps"} or {"row", "broken"} of pairs. Raises UserError where that fails."""
        self._write("".join(map(self._decided, entries)))

    def finish(self) -> None:
        """Writes the last line."""
        if not self.complete:
            kinds = {kind: {"pairs": self.seen[kind], "kept": self.kept[kind]} for kind in (DECIDED, TIES)}
            self._write(_line({"complete": True, **kinds, "broken": len(self.broken), "unmet": self.unmet}))
            self.complete = True

    def _go_on(self, head: dict) -> None:
        where = f"OUT: {self.path}"
        before, lines = _read(self.path, where)
        if (before["pairs"], before["digest"]) != (head["pairs"], head["digest"]):
            raise UserError(f"{where} has the pairs of {before['source']} as it was then; choose another OUT")
        if set(before["scorers"]) != set(head["scorers"]):
            raise UserError(
                f"{where} was scored by {','.join(before['scorers'])}, found --scorers "
                f"{','.join(head['scorers'])}; choose another OUT, or the same scorers"
            )
        texts = [_line(before | {key: head[key] for key in ("gap", "tie_gap")})]
        for line in lines:
            self.complete = "complete" in line
            if not self.complete:
                texts.append(self._decided(line))
        same_rule = (before["gap"], before["tie_gap"]) == (head["gap"], head["tie_gap"])
        self.complete = self.complete and same_rule and len(self.done) == head["pairs"]
        self._unwritten = "".join(texts)

    def _decided(self, entry: dict) -> str:
        """Counts a pair and returns its line."""
        row = entry["row"]
        if row in self.done:
            return ""
        if "broken" in entry:
            self.done.add(row)
            self.broken.append(entry["broken"])
            return _line({"row": row, "broken": entry["broken"]})
        gaps, (first, second) = entry["gaps"], self.source.labels[row]
        self.rule.check(gaps)
        kind = TIES if first == second else DECIDED
        unmet = self.rule.unmet(gaps, kind)
        self.done.add(row)
        self.seen[kind] += 1
        self.kept[kind] += not unmet
        self.unmet.update(self.rule.text(kind, name) for name in unmet)
        return _line({"row": row, "gaps": gaps, "kept": not unmet})

    def _write(self, text: str) -> None:
        if self._unwritten:
            write_all({self.path: self._unwritten + text})
            self._unwritten = ""
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(
                f"OUT: {self.path} cannot be written ({error.strerror}); when that is put right, the same command goes "
                "on from here"
            ) from None


def kept_of(rows: list[int], source: PairSource, data: PairsConfig) -> list[int]:
    """Returns those of a source's rows that data.only keeps; all of them where it is null.

    Raises UserError for a file that is of another source, not complete or broken, or that keeps none of the rows.
    """
    if data.only is None:
        return rows
    kept = _kept_rows(source, data)
    found = [row for row in rows if row in kept]
    if not found:
        raise UserError(
            f"data.only: {data.only} keeps none of {len(rows):,} pairs to train on; `strop filter-pairs` with other "
            "bounds keeps more"
        )
    return found


def _kept_rows(source: PairSource, data: PairsConfig) -> set[int]:
    where = f"data.only: {data.only}"
    head, lines = _read(Path(data.only), where)
    if (head["pairs"], head["digest"]) != (len(source), digest(source)):
        raise UserError(
            f"{where} is of other pairs ({head['pairs']:,}, of {head['source']}) than data.source = {data.source} has "
            f"({len(source):,}); make one of these by `strop filter-pairs`"
        )
    rows, kept, complete = set(), set(), False
    for line in lines:
        complete = "complete" in line
        if not complete:
            rows.add(line["row"])
            kept |= {line["row"]} if line.get("kept") else set()
    if not complete or len(rows) != len(source):
        raise UserError(
            f"{where} is not complete: found {len(rows):,} of {len(source):,} pairs; the command of `strop "
            "filter-pairs` that made it goes on with it"
        )
    return kept


def digest(source: PairSource) -> str:
    """Returns a hash of a source's captions, labels and places of images, the same for a copy in another folder."""
    content = json.dumps([source.captions, source.labels, source.contents()])
    return hashlib.blake2b(content.encode(), digest_size=20).hexdigest()


def _read(path: Path, where: str) -> tuple[dict, Iterator[dict]]:
    """Returns the head of a file and an iterator over its other lines; one that was cut off does not count."""
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read ({one_line(error)}); expected a file of `{MADE_BY}`") from None
    lines = parsed(text[: text.rfind("\n") + 1], where)
    _, head = next(lines, (1, None))
    if not isinstance(head, dict) or head.get("made_by") != MADE_BY or not head.keys() >= HEAD:
        raise UserError(f"{where} is no file of `{MADE_BY}`; its first line says which source, scorers and rule")
    return head, _checked(lines, head["pairs"], where)


def _checked(lines: Iterable[tuple[int, object]], pairs: int, where: str) -> Iterator[dict]:
    for number, line in lines:
        if not isinstance(line, dict) or not ("complete" in line or _is_entry(line, pairs)):
            raise UserError(
                f'{where}: line {number}: found {short(line)}, expected {{"row": 0 to {pairs - 1}, "gaps": {{name: '
                'number}, "kept": true or false} or "broken"'
            )
        yield line


def _is_entry(line: dict, pairs: int) -> bool:
    if not isinstance(line.get("row"), int) or not 0 <= line["row"] < pairs:
        return False
    gaps = line.get("gaps")
    scored = isinstance(gaps, dict) and all(isinstance(gap, int | float) for gap in gaps.values())
    return isinstance(line.get("broken"), str) or (scored and isinstance(line.get("kept"), bool))


def _line(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
