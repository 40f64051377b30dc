"""A wish to stop that a job looks at when it can: for jobs that have to put something back elsewhere first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trimig.status import TERMINAL, Role, Status

if TYPE_CHECKING:
    from trimig.monitor import Monitor


class StopRequest:
    """Asked for once, by a signal or a time limit; give :meth:`ask` to :func:`trimig.cli.runner.run` as *interrupt*."""

    def __init__(self) -> None:
        self.reason = ""
        self._event: trio.Event | None = None

    @property
    def asked(self) -> bool:
        """It is to end."""
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """From now on; *reason* is a signal's name, or the option whose limit was reached."""
        self.reason = self.reason or reason
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Until it is asked for.

        **Cancellation:** no effect.
        """
        if self._event is None:
            self._event = trio.Event()
        if self.asked:
            self._event.set()
        await self._event.wait()


def words_for(monitor: Monitor, file: object) -> str:
    """What a first signal leads to in a command that migrates the guest in *file* away, or receives it there."""
    status, arriving = monitor.status, monitor.role is Role.DESTINATION
    if status in TERMINAL:
        return "it is over already"
    if status is Status.HANDOVER:
        return "it is too late to cancel: " + (
            "the guest is being taken over" if arriving else "the decision has been sent, and its answer is waited for"
        )
    if status in (Status.NONE, Status.SETUP):
        return "ending; no memory has been sent yet"
    return "cancelling; " + ("the source keeps its guest" if arriving else f"the guest stays in {file}")
