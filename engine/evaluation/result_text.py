"""The results of an evaluation as a person reads them: on the terminal in 80 columns, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .cells import markdown_table, shortened
from .intervals import ENOUGH

WIDTHS = (18, 10, 10, 24, 14)  # of a terminal's columns: system, mean, change, interval, wins
HEADER = ("", "mean", "change", "95% interval", "wins")
MARKS = {1: " *", -1: " *", 0: ""}  # beyond chance


def as_text(results: Mapping) -> str:
    """Returns the tables for a terminal: a block for each score, lines of at most 80 columns."""
    lines = []
    for name, rows in blocks(results):
        lines += [_line((shortened(name, WIDTHS[0]), *HEADER[1:]))]
        lines += [_line((f"  {shortened(row[0], WIDTHS[0] - 3)}", *row[1:])) for row in rows]
        lines.append("")
    published = results.get("published")
    if published:
        rows = [("", *published["columns"]), *((f"  {row[0]}", *map(number, row[1:])) for row in published["rows"])]
        lines += [
            published["source"],
            *(f"{first:<18}{''.join(f'{cell:>13}' for cell in cells)}" for first, *cells in rows),
        ]
    return "\n".join(lines).rstrip()


def as_markdown(results: Mapping) -> str:
    """Returns a page with the protocol, the systems and a table for each score."""
    lines = ["# Evaluation", "", f"Protocol {results['protocol_text']}; {results['prompts']} prompts.", ""]
    for name, system in results["systems"].items():
        lora = f", LoRA {system['lora']} at strength {system['strength']:g}" if "lora" in system else ""
        lines.append(f"- {name}: {system['model']['path']}{lora}")
    for name, rows in blocks(results):
        lines += ["", markdown_table((name, *HEADER[1:]), rows)]
    lines += ["", f"{note(results)}", "", *(f"- {sentence}" for sentence in results["verdict"])]
    published = results.get("published")
    if published:
        rows = [(row[0], *map(number, row[1:])) for row in published["rows"]]
        lines += ["", f"{published['source']}:", "", markdown_table(("", *published["columns"]), rows)]
    return "\n".join(lines) + "\n"


def note(results: Mapping) -> str:
    """Returns what the columns mean."""
    answer = "the mean of a prompt's images is" if results["seeds"] > 1 else "the image of a prompt is"
    return (
        f"Same prompts and noise for all; {answer} one answer. A change marked * is beyond chance, all comparisons "
        "taken together (Holm). Wins: share of images better than the base's, ties one half."
    )


def blocks(results: Mapping) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Yields for each score its name and a row of HEADER's cells for each system."""
    for name, by_system in results["scores"].items():
        rows = []
        for system, row in by_system.items():
            if "delta" not in row:
                rows.append((system, number(row["mean"]), "", "", ""))
                continue
            change = number(row["delta"], "+") + MARKS[row["direction"]]
            few = f"under {ENOUGH} prompts" if row["n"] < ENOUGH else "all alike"
            wins = f"{row['wins']['rate']:.0%}"
            if row["wins"]["ci95"]:
                low, high = row["wins"]["ci95"]
                wins += f" ({100 * low:.0f}-{100 * high:.0f})"
            interval = " to ".join(number(end, "+") for end in row["ci95"]) if row["ci95"] else few
            rows.append((system, number(row["mean"]), change, interval, wins))
        yield name, rows


def number(value: float | None, sign: str = "") -> str:
    """Returns a number in four significant digits, at least with three decimals below 10."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _line(cells: tuple[str, ...]) -> str:
    first, *others = zip(cells, WIDTHS, strict=False)
    return (first[0].ljust(first[1]) + "".join(text.rjust(width) for text, width in others)).rstrip()
