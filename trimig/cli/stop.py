"""A request to stop that a job polls: for jobs that first have to restore something in another process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trimig.status import BEFORE_MEMORY, TERMINAL, Role, Status

if TYPE_CHECKING:
    from trimig.monitor import Monitor


class StopRequest:
    """Requested once, by a signal or a time limit; pass :meth:`ask` to :func:`trimig.cli.runner.run` as *interrupt*."""

    def __init__(self) -> None:
        self.reason = ""
        self._event: trio.Event | None = None

    @property
    def asked(self) -> bool:
        """Whether a stop was requested."""
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Request the stop; *reason* is a signal's name, or the option whose limit was reached."""
        self.reason = self.reason or reason
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Wait for the request.

        **Cancellation:** no effect.
        """
        if self._event is None:
            self._event = trio.Event()
        if self.asked:
            self._event.set()
        await self._event.wait()


def words_for(monitor: Monitor, file: object) -> str:
    """The text for a first signal to a command that migrates the guest in *file*, or receives it there."""
    status, arriving = monitor.status, monitor.role is Role.DESTINATION
    if status in TERMINAL:
        return "it is over already"
    if status is Status.HANDOVER:
        return "it is too late to cancel: " + (
            "the guest is being taken over"
            if arriving
            else "the decision has been sent, and the answer has not come yet"
        )
    if status in BEFORE_MEMORY:
        return "ending; no memory has been sent yet"
    return "cancelling; " + ("the source keeps its guest" if arriving else f"the guest stays in {file}")
