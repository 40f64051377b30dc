"""The rule of trio's streams: one task at a time in a direction."""

from __future__ import annotations

import trio


class OneTask:
    """A context manager that one task at a time may enter.

    Args:
        doing: what the task does, for the message.
    """

    __slots__ = ("_doing", "inside")

    def __init__(self, doing: str) -> None:
        self._doing = doing
        #: True while a task is inside the block.
        self.inside = False

    def __enter__(self) -> None:
        if self.inside:
            raise trio.BusyResourceError(f"another task is {self._doing}")
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False
