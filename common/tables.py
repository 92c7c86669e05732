"""Markdown tables: a header and rows of cells."""

from collections.abc import Iterable

from common.printable import printable


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table. What can't be printed in a cell is escaped."""
    header = list(header)
    lines = [_row(header), "|" + "---|" * len(header)]
    for row in rows:
        lines.append(_row(row))
    return lines


def _row(cells):
    return "| " + " | ".join(printable(cell, 1000) for cell in cells) + " |"
