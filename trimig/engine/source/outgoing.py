"""What the phases of an outgoing migration share."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ...channel.channel import Channel
from ...channel.channels import ChannelKind, Channels
from ...errors import Ownership
from ...guest import CountingGuest
from .. import guest_calls
from ..phase import phase

if TYPE_CHECKING:
    from ...channel.connections import Connections
    from ...channel.limiter import Limiter
    from ...channel.return_path import ReturnPathReader
    from ...config.config import Config
    from ...guest import DirtyTracker, Guest, PageBitmap
    from ...monitor.core import MonitorCore
    from ...status import Status
    from ..ram.sender import RamSender

T = TypeVar("T")

#: Records the decision somewhere durable; a failure rolls back.
CommitHook = Callable[[], Awaitable[None]]
#: Finds out, or forces, who owns the guest when the answer did not come.
FenceHook = Callable[[], Awaitable[Ownership]]

#: The likely reason if a destination has connected and says nothing at all.
SILENT_PEER: Final = "with multifd on there it waits for further connections, so turn multifd off there"

#: Phases in which the guest stands still -> their part of the downtime.
_DOWNTIME: Final = {"pause": "pause", "hold": "held", "rest": "ram", "devices": "devices", "prepare": "prepare"}


class Outgoing:
    """One outgoing migration. A phase sets what later phases, and the end of the attempt, need.

    Args:
        commit: called before the decision is sent.
        fence: asked for the owner if the answer to the decision is missing.
    """

    def __init__(
        self,
        guest: Guest,
        connections: Connections,
        config: Config,
        monitor: MonitorCore,
        commit: CommitHook | None,
        fence: FenceHook | None,
    ) -> None:
        self.guest = guest
        self.connections = connections
        self.config = config
        self.monitor = monitor
        self.counters = monitor.counters
        self.commit_hook = commit
        self.fence_hook = fence
        self.channels = Channels()
        self.counters.count_bytes = lambda: self.channels.sent
        # set by `connect`
        self.channel: Channel | None = None
        #: The second connection of postcopy-preempt.
        self.preempt: Channel | None = None
        self.limiter: Limiter | None = None
        self.reader: ReturnPathReader | None = None
        #: The destination answers. A reader alone does not show that: a stream may be stored at the other end.
        self.has_return_path = False
        #: SWITCHOVER_ACK messages that the switchover waits for.
        self.acks = 0
        # set by `announce`
        #: Writes the RAM of the first connection.
        self.sender: RamSender | None = None
        self.tracker: DirtyTracker | None = None
        # set by `precopy`
        #: Pages that the last pass left, by block.
        self.left: Sequence[PageBitmap] = ()
        # set before a switch to postcopy
        #: The id of this attempt, once the destination has been told it.
        self.attempt: bytes | None = None
        # set by `pause`
        #: The guest was asked to pause, so it must be resumed if it stays here.
        self.paused_by_us = False
        #: The run state that the guest is to have at the destination.
        self.run_state = ""
        #: How often the guest had been started when it was stopped, if it counts that.
        self.starts = 0
        # set by `prepare` and `commit`
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
        if self.limiter is not None:
            self.limiter.set_rate(self.rate)

    async def open_preempt(self) -> None:
        """Open the second connection of postcopy-preempt, if it is on and not there. TransportFailed, ConfigError.

        **Cancellation:** there is none.
        """
        beside = self.connections.for_preempt(self.config)
        if beside is not None and not self.channels.has(ChannelKind.PREEMPT):
            self.preempt = Channel(await beside(), stall_timeout=self.config.stall_timeout)
            self.channels.add(ChannelKind.PREEMPT, self.preempt)

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

    def count_sync(self) -> None:
        """Dirty pages have been asked for once more."""
        self.counters.dirty_sync_count += 1
        self.monitor.emit("MIGRATION_PASS", **{"pass": self.counters.dirty_sync_count})

    def count_starts(self) -> int:
        """How often the guest has been started; 0 if it does not count that."""
        return self.guest.starts if isinstance(self.guest, CountingGuest) else 0

    def warn_one_way(self, what: str) -> None:
        """Warn that the destination cannot answer, because of *what*."""
        self.monitor.warn(f"{what}: the destination cannot confirm that it has the guest, nor refuse it")

    def commit_not_sent(self, channel: Channel) -> bool:
        """No byte of the commit has left, so the destination cannot own the guest."""
        return channel.sent <= self.commit_offset and not channel.unsure
