"""An analysis as tables: for the terminal in 80 columns, and as Markdown."""

from __future__ import annotations

import textwrap

from ..evaluation.cells import markdown_table, p_value, shortened
from ..evaluation.intervals import SURE
from .analysis import ENOUGH, TOO_FEW

TITLE = "# User study"
FEW_RATERS = 5
WIDTHS = (24, 5, 5, 5, 7, 14, 8, 0)  # of the columns on the terminal; the last one is as wide as its text


def as_text(result: dict) -> str:
    """The tables for a terminal, 80 columns wide."""
    blocks = [textwrap.fill(_summary(result), 80)]
    for title, header, rows in _tables(result):
        lines = [_line((title[:23], *header)), *(_line((f"  {row[0]}"[:23], *row[1:])) for row in rows)]
        blocks.append("\n".join(lines))
    blocks += [textwrap.fill(sentence, 80) for sentence in _sentences(result)]
    return "\n\n".join(blocks)


def as_markdown(result: dict) -> str:
    """The same as a page of Markdown."""
    tables = [markdown_table((title, *header), rows) for title, header, rows in _tables(result)]
    return "\n\n".join([TITLE, _summary(result), *tables, *_sentences(result)]) + "\n"


def _summary(result: dict) -> str:
    raters, care = result["raters"], result["all_raters"]
    shown = sum(rater["shown"] for rater in raters.values())
    people = f"{len(raters)} {'rater' if len(raters) == 1 else 'raters'}"
    return (
        f"{people}, {result['prompts']} prompts, {care['answered']} of {shown} pairs answered. Rate: share of pairs "
        f"won by the first system, ties counted half; intervals of 95 %: {result['interval']}."
    )


def _tables(result: dict) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Returns (title, header, rows) of each table: every two systems, all on one scale, raters, questions."""
    tables = [_pair_table(pair, result["questions"]) for pair in result["pairs"]]
    for question, strengths in (result["strengths"] or {}).items():
        tables.append(_strength_table(result["questions"][question], strengths))
    return [*tables, _rater_table(result), _question_table(result)]


def _pair_table(pair: dict, titles: dict[str, str]) -> tuple:
    rows = []
    for question, row in pair["questions"].items():
        counts = [str(row[name]) for name in ("win", "tie", "lose")]
        rows.append((titles[question], *counts, _number(row["rate"]), _interval(row), p_value(row["p_holm"])))
        among = {"ci95": row["ci95_decided"], "verdict": row["verdict"]}
        rows.append(("  ties left out", str(row["win"]), "", str(row["lose"]), _number(row["rate_decided"]),
                     _interval(among) if among["ci95"] else "", ""))  # fmt: skip
    title = f"{shortened(pair['first'], 10)} : {shortened(pair['second'], 10)}"
    return title, ("win", "tie", "lose", "rate", "interval", "p (Holm)"), rows


def _strength_table(title: str, strengths: dict | None) -> tuple:
    rows = []
    for name, row in (strengths["systems"] if strengths else {}).items():
        interval = "{:.2f} to {:.2f}".format(*row["ci95"]) if row["ci95"] else ""
        rows.append((shortened(name, 20), "", "", "", f"{row['strength']:.2f}", interval))
    return title, ("", "", "", "strength", "interval"), rows or [("no finite estimate",)]


def _rater_table(result: dict) -> tuple:
    rows = []
    for name, rater in result["raters"].items():
        passed, repeats, left = rater["sentinels"], rater["consistency"]["general"], rater["left"]["general"]
        rows.append((
            shortened(name, 20),
            _share(rater["answered"], rater["shown"]),
            _share(passed["passed"], passed["of"]),
            _share(repeats["same"], repeats["of"]),
            _share(rater["too_fast"]["count"], rater["answered"]),
            "" if rater["median_seconds"] is None else f"{rater['median_seconds']:.1f} s",
            _number(left["rate"]),
        ))  # fmt: skip
    return "rater", ("done", "sent.", "same", "fast", "median time", "left"), rows


def _question_table(result: dict) -> tuple:
    care, rows = result["all_raters"], []
    for question, title in result["questions"].items():
        left, same = care["left"][question], care["consistency"][question]
        alpha = result["alpha"][question]
        shares = "", _share(same["same"], same["of"])
        rows.append(
            (title, "", *shares, "" if alpha is None else f"{alpha:.2f}", _number(left["rate"]), p_value(left["p"]))
        )
    return "all raters", ("", "", "same", "alpha", "left chosen", "p"), rows


def _sentences(result: dict) -> list[str]:
    sentences = []
    for pair in result["pairs"]:
        verdicts = {}
        for question, row in pair["questions"].items():
            few = f" ({row['answers']} answers, {ENOUGH} are wanted)" if row["verdict"] == TOO_FEW else ""
            verdicts.setdefault(row["verdict"] + few, []).append(result["questions"][question].lower())
        said = "; ".join(f"{', '.join(questions)}: {verdict}" for verdict, questions in verdicts.items())
        sentences.append(f"{pair['first']} against {pair['second']}. {said[0].upper()}{said[1:]}.")
    for question, left in result["all_raters"]["left"].items():
        if left["p"] is not None and left["p"] < SURE:
            side = "left" if left["rate"] > 0.5 else "right"
            sentences.append(
                f"The {side} image was favoured, {result['questions'][question].lower()} (p {p_value(left['p'])})."
            )
    if 1 < len(result["raters"]) < FEW_RATERS:
        sentences.append(f"Fewer than {FEW_RATERS} raters: the intervals are rough.")
    return sentences


def _line(cells: tuple[str, ...]) -> str:
    first, *others = cells
    padded = [f"{cell:>{width}}" for cell, width in zip(others, WIDTHS[1:], strict=False)]
    return (f"{first:<{WIDTHS[0]}}" + " ".join(padded)).rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(row: dict) -> str:
    return "{:.3f} to {:.3f}".format(*row["ci95"]) if row["ci95"] else TOO_FEW


def _share(part: int, of: int) -> str:
    return f"{100 * part / of:.0f} %" if of else ""
