"""GenEval's results as tables: for the terminal in 80 columns, and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .cells import markdown_table, p_value, shortened
from .geneval_results import FORMAT, OVERALL, TASKS, Results, compare, scores
from .published import GENEVAL

TITLE = "# GenEval"
WIDTHS = (25, 8, 8, 8, 18, 9)  # of the columns on the terminal
CELLS = {"single_object": "single object", "two_object": "two objects", "color_attr": "color attribution"}


def result_of(files: Sequence[Results], published: bool) -> dict:
    """Returns all numbers: the scores of each file, and each against the first; shares from 0 to 1."""
    base, *others = files
    return {
        "format": FORMAT,
        "tasks": base.tasks,
        "overall": f"mean of {len(base.tasks)} task scores",
        "systems": {file.name: {"scores": scores(file), "faults": file.faults} for file in files},
        "changes": {tuned.name: compare(base, tuned) for tuned in others},
        "published_not_measured_here": GENEVAL if published else {},
    }


def as_text(result: dict) -> str:
    """The tables for a terminal, at most 80 columns wide."""
    blocks = ["\n".join(map(_line, table)) for table in _tables(result)]
    return "\n\n".join([*blocks, *(textwrap.fill(sentence, 80) for sentence in _sentences(result))])


def as_markdown(result: dict) -> str:
    """The same as a page of Markdown."""
    tables = [markdown_table(header, rows) for header, *rows in _tables(result)]
    return "\n\n".join([TITLE, *tables, *_sentences(result)]) + "\n"


def _tables(result: dict) -> list[list[tuple[str, ...]]]:
    """Returns tables of a header and rows: one a file, and one for each file against the first."""
    tables = []
    for name, system in result["systems"].items():
        rows = [
            (_title(task), str(row["prompts"]), str(row["images"]), f"{100 * row['score']:.2f}", _interval(row))
            for task, row in system["scores"].items()
        ]
        tables.append([(shortened(name, 24), "prompts", "images", "score", "interval"), *rows])
    base = next(iter(result["systems"]))
    for name, changes in result["changes"].items():
        before, after = (result["systems"][system]["scores"] for system in (base, name))
        rows = [
            (_title(task), *(f"{100 * side[task]['score']:.2f}" for side in (before, after)),
             f"{100 * row['delta']:+.2f}", _interval(row, "+"), p_value(row["p_holm"]))
            for task, row in changes.items()
        ]  # fmt: skip
        title = f"{shortened(name, 12)} : {shortened(base, 9)}"
        tables.append([(title, "before", "after", "change", "interval", "p (Holm)"), *rows])
    published = result["published_not_measured_here"]
    if published:
        rows = [(name, "", "", f"{score:.2f}") for name, score in published.items()]
        tables.append([("published, not measured here", "", "", "overall"), *rows])
    return tables


def _sentences(result: dict) -> list[str]:
    sentences = [
        f"Scores: percent of images that are correct; overall: {result['overall']}, not of images. Intervals of 95 %, "
        "between prompts."
    ]
    absent = [_title(task) for task in TASKS if task not in result["tasks"]]
    if absent:
        sentences[0] += f" No results of {', '.join(absent)}: this overall is not that of all {len(TASKS)} tasks."
    base = next(iter(result["systems"]))
    for name, changes in result["changes"].items():
        said: dict[str, list[str]] = {}
        for task, row in changes.items():
            said.setdefault(row["verdict"], []).append(_title(task))
        verdicts = "; ".join(f"{', '.join(tasks)}: {verdict}" for verdict, tasks in said.items())
        sentences.append(f"{name} against {base}. {verdicts[0].upper()}{verdicts[1:]}.")
        images = changes[OVERALL]["images"]
        if any(images < result["systems"][system]["scores"][OVERALL]["images"] for system in (base, name)):
            sentences[-1] += f" Changes are of the {images} images that both have."
    for name, system in result["systems"].items():
        sentences += [f"Not complete: {name}: {fault}." for fault in system["faults"]]
    return sentences


def _line(cells: Sequence[str]) -> str:
    first, *others = cells
    padded = "".join(f"{cell:>{width}}" for cell, width in zip(others, WIDTHS[1:], strict=False))
    if len(first) >= WIDTHS[0]:
        padded = padded[len(first) - WIDTHS[0] :]  # a long title over empty cells
    return f"{first:<{WIDTHS[0]}}{padded}".rstrip()


def _title(task: str) -> str:
    return CELLS.get(task, task)


def _interval(row: dict, sign: str = "") -> str:
    if row["ci95"] is None:
        return "too few"
    low, high = (f"{100 * end:{sign}.2f}" for end in row["ci95"])
    return f"{low} to {high}"
