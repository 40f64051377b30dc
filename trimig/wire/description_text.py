"""Receives the description after the end of a stream (stream.md part 7)."""

from __future__ import annotations

from ..errors import RemoteProtocolError
from .constants import Section
from .events import DescriptionElement


class DescriptionText:
    """Collects the text.

    Args:
        longest: the most bytes that are accepted.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._text: bytearray | None = None
        self._length = 0
        self._at = 0

    def take(self, data: memoryview, at: int) -> tuple[DescriptionElement | None, int]:
        """Take the part of the text in *data*, which begins at the offset *at*.

        Returns:
            The description if it is complete; and the number of bytes taken.

        Raises:
            RemoteProtocolError: without an offset; the bytes are no description, or it is too long.
        """
        used = 0
        if self._text is None:
            if not len(data):
                return None, 0
            if data[0] != Section.VMDESCRIPTION:
                raise RemoteProtocolError(f"expected the description behind the end of file, found type {data[0]:#04x}")
            if len(data) < 5:
                return None, 0
            length = int.from_bytes(data[1:5])
            if length > self._longest:
                raise RemoteProtocolError(f"description of {length} bytes, at most {self._longest} are accepted")
            self._length, self._at, self._text, used = length, at, bytearray(), 5
        more = data[used : used + self._length - len(self._text)]
        self._text += more
        used += len(more)
        if len(self._text) < self._length:
            return None, used
        return DescriptionElement(text=bytes(self._text), at=self._at), used

    def cut(self, at: int) -> DescriptionElement:
        """The incomplete description at the end of the connection, which is at the offset *at*."""
        if self._text is None:
            return DescriptionElement(text=b"", complete=False, at=at)
        return DescriptionElement(text=bytes(self._text), complete=False, at=self._at)
