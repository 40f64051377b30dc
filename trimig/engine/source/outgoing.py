"""What the phases of an outgoing migration share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ...errors import Ownership
from ...guest import CountingGuest
from .. import guest_calls
from ..phase import phase

if TYPE_CHECKING:
    from ...config.config import Config
    from ...guest import Guest
    from ...monitor.core import MonitorCore
    from ...status import Status
    from ..sections import SectionHandler
    from .link import Link

T = TypeVar("T")

#: Records the decision somewhere durable; a failure rolls back.
CommitHook = Callable[[], Awaitable[None]]
#: Finds out, or forces, who owns the guest when the answer did not come.
FenceHook = Callable[[], Awaitable[Ownership]]

#: Phases in which the guest stands still -> their part of the downtime.
_DOWNTIME: Final = {"pause": "pause", "hold": "held", "rest": "ram", "devices": "devices", "prepare": "prepare"}


class Outgoing:
    """One outgoing migration that is connected, and the facts that the end of the attempt needs.

    Args:
        commit: called before the decision is sent.
        fence: asked for the owner if the answer to the decision is missing.
    """

    def __init__(
        self,
        guest: Guest,
        config: Config,
        monitor: MonitorCore,
        commit: CommitHook | None,
        fence: FenceHook | None,
        link: Link,
    ) -> None:
        self.guest = guest
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.commit_hook = commit
        self.fence_hook = fence
        self.link = link
        #: The iterative sections that the stream has begun.
        self.sections: list[SectionHandler] = []
        #: The id of this attempt; empty until the destination has been told it, which is for a switch to postcopy.
        self.attempt = b""
        #: The guest was asked to pause, so it must be resumed if it stays here.
        self.paused_by_us = False
        #: The run state that the guest is to have at the destination; empty until it is stopped.
        self.run_state = ""
        #: When the guest was asked to pause, on trio's clock; infinity until then.
        self.stopped_at = math.inf
        #: How often the guest had been started when it was stopped, if it counts that.
        self.starts = 0
        self.prepared = False
        self.in_postcopy = False
        #: Bytes that the transport had taken before it was given the byte that decides.
        self.commit_offset = -1
        self.answered = False
        #: The answer is the destination's own.
        self.confirmed = False
        #: The caller has said who owns the guest.
        self.settled = False
        #: Seconds of the downtime, by its parts.
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the migration, see :func:`trimig.engine.phase.phase`; its seconds may be a part of the downtime."""
        with phase(self.monitor, name) as found:
            yield
        if name in _DOWNTIME:
            self.parts[_DOWNTIME[name]] = found.seconds

    @property
    def rate(self) -> int:
        """The bandwidth limit in force, in bytes per second; 0 for none."""
        parameters = self.monitor.config.parameters
        return parameters.max_postcopy_bandwidth if self.in_postcopy else parameters.max_bandwidth

    def retune(self) -> None:
        """A parameter has changed: the limiter follows."""
        self.link.limiter.set_rate(self.rate)

    async def call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        """The result of a call into the guest's code, which *what* names in the error. GuestFailed.

        **Cancellation:** as for *function*.
        """
        return await guest_calls.call(what, function, self.config.handover_timeout)

    async def advance(self, status: Status) -> None:
        """The next status, unless a cancel has come since the last checkpoint: the monitor is in `cancelling` then.

        **Cancellation:** the status is as it was.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.monitor.advance(status)

    async def find_pending(self) -> None:
        """Find what all sections still have to send: the counter `remaining`. GuestFailed.

        **Cancellation:** see :meth:`trimig.engine.sections.SectionHandler.find_pending`.
        """
        pending = [await section.find_pending() for section in self.sections]
        self.count_sync()
        self.counters.remaining = sum(pending)

    def count_sync(self) -> None:
        """Dirty pages have been asked for once more."""
        self.counters.dirty_sync_count += 1
        self.monitor.emit("MIGRATION_PASS", **{"pass": self.counters.dirty_sync_count})

    def count_starts(self) -> int:
        """How often the guest has been started; 0 if it does not count that."""
        return self.guest.starts if isinstance(self.guest, CountingGuest) else 0

    @property
    def commit_not_sent(self) -> bool:
        """No byte of the commit has left, so the destination cannot own the guest."""
        channel = self.link.channel
        return channel.sent <= self.commit_offset and not channel.unsure
