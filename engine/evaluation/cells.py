"""Cells and tables of text: p-values, names that are too long, Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def p_value(value: float | None) -> str:
    """Returns a p-value in three decimals; "" for None."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def shortened(text: str, width: int) -> str:
    """Returns the text, its middle left out where it is longer than `width`: a strength stands at the end of a name."""
    return text if len(text) <= width else f"{text[: width - 7]}..{text[-5:]}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table whose first column is text and whose others are numbers."""
    cells = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)
