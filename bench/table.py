"""Columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns of equal width; the first *left* of them are aligned to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def one(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(one(line) for line in lines)


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    """*value* with its unit; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f} {unit}".rstrip()
