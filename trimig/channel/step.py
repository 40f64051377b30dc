"""The step of a bulk transfer: what may be moved next, what a partial call has done, and where the stop flag is looked at.

There is neither a thread nor a socket in it. :mod:`.pump` drives it, in a thread or by trio, and a test drives the same object
with a scripted socket::

    step = Step(plan)
    while not step.run(call):        # call: a non-blocking writev or readv, of CALL_BYTES at most
        ...                          # wait until the socket is ready, or stop() was called

What is moved is a *plan*. :class:`.vectored.Records` is a plan for headers and bodies that all have the same sizes, as page
records. :class:`.vectored.Pieces` is one for pieces of any sizes, as the header of a packet and its pages: give it their
addresses and sizes, as arrays. A plan may decide as it goes on, as the prediction of page records does: its ``rest`` is
empty once it wants no more. The memory that a plan names must stay where it is until the transfer has ended; the frame that
awaits the transfer can hold it, because a thread is never left behind.

``Channel.send_vector`` and ``Channel.receive_vector`` take a plan. For a stream that is no kernel socket they drive a step by
trio: they await the stream, and call ``moved``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol, TypeAlias

from .vectored import Span

#: Moves bytes of the first elements of a span, and returns their number: 0 at the end of the stream, None if it would block.
Call: TypeAlias = Callable[[Span], int | None]


class Plan(Protocol):
    """Where bytes are moved from, or to. A thread may call it; no other code does so meanwhile.

    Attributes:
        resting: nothing more must come, but more may come at any time. Where bytes are waited for, the transfer may be left then.
    """

    @property
    def resting(self) -> bool: ...

    @property
    def rest(self) -> Span:
        """The elements that come next, of one call at least; none if nothing more is to be moved."""

    def advance(self, count: int) -> None:
        """*count* more bytes have been moved, at least one."""


class SendPlan(Plan, Protocol):
    """A plan for sending, whose length is known."""

    @property
    def left(self) -> int:
        """Bytes that were not yet moved."""

    def rest_of_unit(self) -> bytes | None:
        """The rest of the record or packet in which the transfer stands: empty between two, None if it is not known."""


class Step:
    """Moves what *plan* says, call by call, until that is done, or the stream has ended, or it was stopped.

    Attributes:
        done: bytes moved by this object; exact after each call, also if the next one fails.
        ended: True after a call that met the end of the stream.
    """

    __slots__ = ("_plan", "_stop", "done", "ended")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stop = False
        self.done = 0
        self.ended = False

    def stop(self) -> None:
        """Make no further call. It may be called from any thread, at any time; a call that is being made goes on."""
        self._stop = True

    @property
    def whole(self) -> bool:
        """Everything that the plan wanted has been moved."""
        return not self._plan.rest[1]

    @property
    def resting(self) -> bool:
        """See :class:`Plan`."""
        return self._plan.resting

    @property
    def over(self) -> bool:
        """No further call is to be made."""
        return self._stop or self.ended or self.whole

    def run(self, call: Call, most: int = sys.maxsize) -> bool:
        """Make calls. The stop flag is looked at before each of them.

        Args:
            most: make no further call after so many bytes.

        Returns:
            False if a call would block; True if the step is over, or *most* bytes were moved.

        Raises:
            Exception: *call* has raised it, and it has moved nothing; or the plan could not take what was moved.
        """
        plan, enough = self._plan, self.done + most
        while not self._stop and not self.ended and self.done < enough:
            rest = plan.rest
            if not rest[1]:
                break
            count = call(rest)
            if count is None:
                return False
            self.moved(count)
        return True

    def moved(self, count: int) -> None:
        """*count* bytes of the plan's rest have been moved; 0 at the end of the stream. For a call that is awaited."""
        if count:
            self.done += count
            self._plan.advance(count)
        else:
            self.ended = True
