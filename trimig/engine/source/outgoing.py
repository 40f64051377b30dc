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
from .turns import Turn

if TYPE_CHECKING:
    from ...config.config import Config
    from ...guest import Guest
    from ...monitor.core import MonitorCore
    from ...status import Status
    from ..sections import SectionHandler
    from .link import Link

T = TypeVar("T")

#: Records the decision in durable storage. If it fails, the guest stays at the source.
CommitHook = Callable[[], Awaitable[None]]
#: Finds out, or decides, which side owns the guest if the answer did not come.
FenceHook = Callable[[], Awaitable[Ownership]]

#: Phases in which the guest is stopped -> the field of Downtime that counts them.
_DOWNTIME: Final = {"pause": "pause", "hold": "held", "rest": "ram", "devices": "devices", "prepare": "prepare"}


class Outgoing:
    """One outgoing migration with a connection, and the facts that the end of the attempt needs: a record that the phases
    write.

    Args:
        commit: called before the decision is sent.
        fence: called for the owner if the answer to the decision is missing.
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
        #: The id of this attempt; empty until it was sent to the destination, which happens before a switch to postcopy.
        self.attempt = b""
        #: True once the guest was paused for this attempt: then it must be resumed if it stays here.
        self.paused_by_us = False
        #: True once the guest was throttled for this attempt, until the throttle was ended.
        self.slowed = False
        #: The run state of the guest before it was stopped, which it gets at the destination; empty until then.
        self.run_state = ""
        #: When the guest was paused, on trio's clock; infinity until then.
        self.stopped_at = math.inf
        #: The guest's count of starts when it was stopped; 0 for a guest that does not count.
        self.starts = 0
        self.prepared = False
        self.in_postcopy = False
        #: The bytes that are sent before the deciding byte: the end of file, or the last byte of the package. -1 until then.
        self.commit_offset = -1
        self.answered = False
        #: True if the destination itself has sent the answer.
        self.confirmed = False
        #: True once the caller has settled which side owns the guest.
        self.settled = False
        #: Whether the guest may be stopped now.
        self.turn = Turn()
        #: Seconds of the downtime, by its parts.
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the block as a phase, see :func:`trimig.engine.phase.phase`, and count its seconds in the downtime."""
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
        """Give the limiter the present bandwidth limit, after a parameter has changed."""
        self.link.limiter.set_rate(self.rate)

    async def call(self, what: str, function: Callable[[], Awaitable[T]]) -> T:
        """Call *function* of the guest's code and return its result. GuestFailed names the call by *what*.

        **Cancellation:** as for *function*.
        """
        return await guest_calls.call(what, function, self.config.handover_timeout)

    async def advance(self, status: Status) -> None:
        """Change the status, unless a cancel has come since the last checkpoint.

        **Cancellation:** the status is not changed; after :meth:`trimig.Monitor.cancel` it is `cancelling`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self.monitor.advance(status)

    async def find_pending(self) -> None:
        """Set the counter `remaining` to the bytes that all sections still have to send. GuestFailed.

        **Cancellation:** see :meth:`trimig.engine.sections.SectionHandler.find_pending`.
        """
        pending = [await section.find_pending() for section in self.sections]
        self.count_sync()
        self.counters.remaining = sum(pending)

    def count_sync(self) -> None:
        """Count one more dirty sync."""
        self.counters.dirty_sync_count += 1
        self.monitor.emit("MIGRATION_PASS", **{"pass": self.counters.dirty_sync_count})

    def count_starts(self) -> int:
        """How often the guest has been started; 0 for a guest that does not count its starts."""
        return self.guest.starts if isinstance(self.guest, CountingGuest) else 0

    @property
    def commit_not_sent(self) -> bool:
        """True if the deciding byte has not left this side: then the destination cannot own the guest."""
        channel = self.link.channel
        return channel.sent <= self.commit_offset and not channel.unsure
