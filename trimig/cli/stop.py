"""A wish to stop that a job looks at when it can: for jobs that have to put something back elsewhere first."""

from __future__ import annotations

import trio


class Stop:
    """Asked for once, by a signal or a time limit; give :meth:`ask` to :func:`trimig.cli.common.run` as *interrupt*."""

    def __init__(self) -> None:
        self.reason = ""
        self._event: trio.Event | None = None

    @property
    def asked(self) -> bool:
        """Somebody wants it to end."""
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
