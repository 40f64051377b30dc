"""A few lines at the bottom of a terminal that are redrawn, below all other output."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, cast

#: Used if the terminal does not report its size.
_COLUMNS, _LINES = 80, 24


def wrapped(text: str, columns: int) -> list[str]:
    """*text* in lines that fit."""
    return textwrap.wrap(text, max(20, columns - 1), subsequent_indent="  ") or [""]


class Screen:
    """Draws on *stream*, a terminal. The caller handles a stream that fails (:mod:`trimig.cli.output`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn: list[str] = []

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines at present."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            size = os.terminal_size((0, 0))
        return os.terminal_size((size.columns or _COLUMNS, size.lines or _LINES))

    def draw(self, lines: Sequence[str]) -> None:
        """Show *lines* in place of the earlier ones; cut off what does not fit, so that the terminal never scrolls."""
        columns, height = self.size
        shown = [line[: columns - 1] for line in lines[: height - 1]]
        self._stream.write(self._erasing() + "\n".join(shown))
        self._stream.flush()
        self._drawn = shown

    def erase(self) -> None:
        """Remove the lines; the next :meth:`draw` begins at the cursor."""
        if self._drawn:
            self._stream.write(self._erasing())
            self._stream.flush()
            self._drawn = []

    def _erasing(self) -> str:
        if not self._drawn:
            return ""
        # A terminal that has become narrower has wrapped the lines.
        columns = self.size.columns
        rows = sum(max(1, math.ceil(len(line) / columns)) for line in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"

    def above(self, stream: TextIO) -> TextIO:
        """*stream*, but each write first erases the drawn lines; the next :meth:`draw` shows them again below."""
        return cast(TextIO, _Above(self, stream))


class _Above:
    """Erases the picture before each write; a text stream otherwise."""

    def __init__(self, screen: Screen, stream: TextIO) -> None:
        self._screen = screen
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text:
            self._screen.erase()
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
