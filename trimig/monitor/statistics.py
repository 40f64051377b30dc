"""The figures of a migration: the engine's counters, the records that callers get, and QEMU's ``query-migrate``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..guest import PAGE_SIZE
from ..status import RUNNING, WITH_ERROR, Role, Status

if TYPE_CHECKING:
    from ..errors import Ownership


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of a migration. ``name`` and ``data`` are QMP's where QMP has such an event."""

    name: str
    data: Mapping[str, Any]
    #: When it happened, in seconds of trio's clock.
    time: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """Whether the migration converges, the reason, and measures that would help."""

    #: True if what is left will fit into the downtime limit, as far as the passes so far show.
    converging: bool
    #: One sentence with the deciding figures.
    reason: str
    #: Measures that would help, one clause each, most effective first; empty if none is needed.
    advice: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageCost:
    """What a dirtied page would take in an encoding that is off, as a sample shows."""

    #: Bytes of its record.
    size: float
    #: Seconds of processor time.
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodingUse:
    """What one of the encodings has done among which ``encoding = "auto"`` chooses."""

    #: ``plain``, or the capability: ``xbzrle``, ``compress``.
    name: str
    #: Number of pages for which it was chosen. Of these, an encoder sends some as they are, which it does not make shorter.
    pages: int = 0
    #: Bytes that plain pages would have taken more; below 0 if they would have taken less.
    saved_bytes: int = 0
    #: Seconds of processor time that the encoding has taken.
    processor_time: float = 0.0

    def members(self) -> Mapping[str, object]:
        """An element of ``used`` in the member ``encoding`` of ``query-migrate``."""
        return {
            "encoding": self.name,
            "pages": self.pages,
            "saved-bytes": self.saved_bytes,
            "processor-time": _ms(self.processor_time),
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The figures of a migration at one moment."""

    #: The status of the present or the last attempt.
    status: Status
    #: Which side may run the guest, as far as this side can tell.
    owner: Ownership
    #: Bytes of RAM of the guest.
    total: int
    #: All bytes sent over the transport so far (source), or received (destination).
    transferred: int
    #: Bytes of RAM still to be sent, as of the last dirty sync.
    remaining: int
    #: Number of pages sent or received with their content.
    normal_pages: int
    #: Number of pages of zeros, sent or received as short records.
    zero_pages: int
    #: Number of passes over the memory, the present one included.
    iteration: int
    #: Bytes per second that the transport takes, as measured.
    bandwidth: float
    #: Bytes of RAM per second that the guest wrote in the last pass.
    dirty_rate: float
    #: Seconds of downtime if the switchover began now; None until a bandwidth was measured.
    expected_downtime: float | None
    #: Seconds since the attempt began; at its end the whole time.
    elapsed: float
    #: How dirty pages are found: ``userfaultfd-wp``, ``compare``, ``marks``, ``none``; empty on a destination.
    dirty_tracking: str
    #: The share of the memory that has been copied once, 0 to 1; never falls.
    first_copy: float = 0.0
    #: After the first copy: the largest share of the rest that fitted into the downtime limit, 0 to 1. At 1 the whole
    #: rest fits.
    convergence_progress: float = 0.0
    #: Whether the passes converge; None before the first pass, and on a destination.
    convergence: Convergence | None = None
    #: Source: number of pages sent in another encoding, of a capability such as xbzrle, or not sent because the destination
    #: had them. They are not among the normal pages.
    encoded_pages: int = 0
    #: Source: bytes of the records of these pages.
    encoded_bytes: int = 0
    #: Number of open connections for pages beside the main one (multifd).
    data_channels: int = 0
    #: Bytes of :attr:`transferred` that went over them.
    multifd_bytes: int = 0
    #: The share of its running time that is taken from the guest (auto-converge), in percent; 0 for none.
    throttle: int = 0
    #: Source: what each encoding has done; empty unless the option ``encoding`` is ``auto``.
    encodings: tuple[EncodingUse, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Downtime:
    """The parts of the downtime, in seconds, by this side's clock.

    A source fills all parts but ``resume``; a destination fills only ``resume``, the time to activate the guest. On the
    source that time is a part of ``commit``.
    """

    #: Seconds to stop the guest.
    pause: float = 0.0
    #: Seconds in pre-switchover, until the permission to go on.
    held: float = 0.0
    #: Seconds to send the last pages.
    ram: float = 0.0
    #: Seconds to save and send the devices.
    devices: float = 0.0
    #: Seconds until the proof that the destination has loaded everything.
    prepare: float = 0.0
    #: Seconds from the decision to its answer.
    commit: float = 0.0
    #: Seconds to activate the guest.
    resume: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the parts, in seconds."""
        return self.pause + self.held + self.ram + self.devices + self.prepare + self.commit + self.resume


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result of a migration. Returned only when the destination owns the guest."""

    #: The side of this process.
    role: Role
    #: Source: True if the destination has confirmed that it owns the guest. Destination: True if it has sent that
    #: confirmation. False without a return path: the transport took the last byte, and the arrival is not confirmed.
    confirmed: bool
    #: True if the destination proved, before the decision was sent, that it had loaded everything (needs a return path).
    prepared: bool
    #: Seconds from the begin of the attempt to its end; at a destination from the connection of the source on.
    total_time: float
    #: Source: seconds of it until the list of RAM blocks was sent; 0 on a destination.
    setup_time: float
    #: Seconds in which the guest ran on neither side, by this side's clock.
    downtime: float
    #: The parts of the downtime.
    downtime_parts: Downtime
    #: Number of passes over the memory; 0 on a destination.
    iterations: int
    #: Bytes sent over the transport (source), or received (destination).
    bytes_transferred: int
    #: Number of pages sent or received with their content.
    normal_pages: int
    #: Number of pages of zeros, sent or received as short records.
    zero_pages: int
    #: Bytes of RAM of the guest.
    ram_bytes: int
    #: How dirty pages were found, as in :class:`Statistics`.
    dirty_tracking: str
    #: Problems that did not endanger the guest; one sentence each.
    warnings: tuple[str, ...] = ()
    #: The convergence after the last pass; None on a destination.
    convergence: Convergence | None = None
    #: Source: number of pages sent in another encoding, as in :class:`Statistics`.
    encoded_pages: int = 0
    #: Source: bytes of the records of these pages.
    encoded_bytes: int = 0
    #: Number of connections for pages beside the main one (multifd).
    data_channels: int = 0
    #: Bytes of :attr:`bytes_transferred` that went over them.
    multifd_bytes: int = 0
    #: Destination: seconds of waiting until a source had connected, before :attr:`total_time` begins.
    waiting_time: float = 0.0
    #: Source: what each encoding has done, as in :class:`Statistics`.
    encodings: tuple[EncodingUse, ...] = ()

    @property
    def throughput(self) -> float:
        """Guest memory moved (every copy of a page counted) in bytes per second of the total time."""
        moved = (self.normal_pages + self.zero_pages + self.encoded_pages) * PAGE_SIZE
        return moved / self.total_time if self.total_time > 0 else 0.0


@dataclasses.dataclass(slots=True)
class Counters:
    """The engine's counters: a record that the functions of the engine write. Bytes, seconds; times are trio's clock."""

    started: float = 0.0
    setup_done: float | None = None
    paused_at: float | None = None
    finished: float | None = None
    total: int = 0
    #: Returns the value of :attr:`transferred`.
    count_bytes: Callable[[], int] = int
    #: Number of data channels that have been opened (multifd).
    data_channels: int = 0
    #: Bytes sent when the guest stopped, as in :attr:`on_main`; 0 for a guest that never ran during the migration; None
    #: while it runs.
    transferred_at_pause: int | None = None
    #: Source: bytes sent at the switch to postcopy, as in :attr:`on_main`; None before that.
    transferred_at_postcopy: int | None = None
    remaining: int = 0
    normal: int = 0
    duplicate: int = 0
    #: Source: pages sent in another encoding than PAGE and ZERO, or not sent because the destination had them, and the
    #: bytes of their records.
    encoded: int = 0
    encoded_bytes: int = 0
    #: Source: what each encoding has done, by its name, if the option ``encoding`` is ``auto``.
    encodings: dict[str, EncodingUse] = dataclasses.field(default_factory=dict)
    #: Source: what a dirtied page would take in encodings that are off, by the names of :mod:`trimig.policy.encoding_advice`.
    samples: dict[str, PageCost] = dataclasses.field(default_factory=dict)
    #: Bytes of the data channels of multifd, sent (source) or received (destination).
    multifd_bytes: int = 0
    #: Members of query-migrate that only one capability has, by name: each capability adds its own. A destination shows
    #: them when it has completed, a source from the first copy on.
    members: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    #: Destination: after a lost postcopy, the pages that never came, by block: the first page and the page after the
    #: last.
    missing: Mapping[str, Sequence[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    #: Pages that the guest in postcopy waited for.
    page_requests: int = 0
    #: Source: True once the migration has switched to postcopy.
    switched_to_postcopy: bool = False
    iteration: int = 0
    dirty_sync_count: int = 0
    #: Source: bytes that the dirty syncs have found newly dirty; a page that was dirty before is not counted again.
    dirtied: int = 0
    #: Source: the share of its running time that is taken from the guest (auto-converge), in percent.
    throttle: int = 0
    bandwidth: float = 0.0
    pages_per_second: float = 0.0
    dirty_rate: float = 0.0
    #: Updated after each pass.
    expected_downtime: float | None = None
    #: The same in the form that QEMU shows: not changed by a pass that sent almost nothing, or after which no page was
    #: dirty.
    shown_downtime: float | None = None
    downtime: float | None = None
    dirty_tracking: str = ""
    #: True once all memory has been sent once.
    first_copy_done: bool = False
    #: 0 to 1, see :class:`Statistics`.
    convergence_progress: float = 0.0
    convergence: Convergence | None = None
    error: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def transferred(self) -> int:
        """Bytes sent (source) or received (destination) so far, over all connections."""
        return self.count_bytes()

    @property
    def handled(self) -> int:
        """Pages sent or received in any encoding; a page that was sent twice counts twice."""
        return self.normal + self.duplicate + self.encoded

    @property
    def on_main(self) -> int:
        """The bytes of :attr:`transferred` without those over data channels (multifd)."""
        return max(0, self.transferred - self.multifd_bytes)

    @property
    def first_copy(self) -> float:
        """See :class:`Statistics`."""
        if self.first_copy_done:
            return 1.0
        return min(1.0, self.handled * PAGE_SIZE / self.total) if self.total else 0.0


def socket_address(uri: str) -> dict[str, str]:
    """QEMU's object for a listening URI; for a transport that QEMU has no type for, ``x-uri`` and the URI."""
    scheme, _, rest = uri.partition(":")
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        return {"type": "inet", "host": host.removeprefix("[").removesuffix("]"), "port": port}
    if scheme == "unix":
        return {"type": "unix", "path": rest}
    if scheme == "fd":
        return {"type": "fd", "str": rest}
    return {"type": "x-uri", "uri": uri}


def query_migrate(
    c: Counters,
    *,
    role: Role | None,
    status: Status,
    owner: Ownership,
    addresses: Sequence[str],
    blocked: Sequence[str],
    downtime_limit: int,
    now: float,
) -> dict[str, Any]:
    """The members of QEMU's ``query-migrate``, present as in its table per status (config.md part 6).

    Args:
        addresses: where a destination listens.
        blocked: the reasons against a migration.
        downtime_limit: the parameter, in ms.
        now: the present time, by the clock of *c*.
    """
    info: dict[str, Any] = {"blocked-reasons": list(blocked)} if blocked else {}
    if addresses and role is not Role.SOURCE:
        info["socket-address"] = [socket_address(uri) for uri in addresses]
    if status is Status.NONE:
        return info
    info |= {"status": status.qmp, "owner": owner.value}
    if status in WITH_ERROR and c.error is not None:
        info["error-desc"] = c.error
    if c.warnings:
        info["warnings"] = list(c.warnings)
    if role is Role.DESTINATION:
        if c.data_channels:
            info["multifd-bytes"] = c.multifd_bytes
        if status is Status.COMPLETED:
            info |= {name: member() for name, member in c.members.items()}
        return info
    if c.dirty_tracking:
        info["dirty-tracking"] = c.dirty_tracking
    running = status in RUNNING
    if not running and status is not Status.COMPLETED:
        return info
    end = c.finished if c.finished is not None else now
    info["total-time"] = _ms(end - c.started)
    info["setup-time"] = _ms((c.setup_done or c.started) - c.started)
    if running:
        expected = c.shown_downtime
        if c.throttle:
            info["cpu-throttle-percentage"] = c.throttle
        info["expected-downtime"] = downtime_limit if expected is None or math.isinf(expected) else _ms(expected)
        if c.convergence is not None:
            info["convergence"] = {
                "converging": c.convergence.converging,
                "reason": c.convergence.reason,
                "advice": list(c.convergence.advice),
            }
    else:
        info["downtime"] = _ms(c.downtime or 0.0)
    info["ram"] = _ram(c, end, completed=not running)
    return info | {name: member() for name, member in c.members.items()}


def _ram(c: Counters, end: float, *, completed: bool) -> dict[str, Any]:
    at_postcopy = c.on_main if c.transferred_at_postcopy is None else min(c.on_main, c.transferred_at_postcopy)
    at_pause = at_postcopy if c.transferred_at_pause is None else min(at_postcopy, c.transferred_at_pause)
    duration = end - (c.setup_done or c.started)
    rate = c.transferred / duration if completed and duration > 0 else c.bandwidth
    return {
        "transferred": c.transferred,
        "remaining": 0 if completed else c.remaining,
        "total": c.total,
        "duplicate": c.duplicate,
        "skipped": 0,
        "normal": c.normal,
        "normal-bytes": c.normal * PAGE_SIZE,
        "dirty-pages-rate": 0 if completed else round(c.dirty_rate / PAGE_SIZE),
        "mbps": rate * 8 / 1e6,
        "dirty-sync-count": c.dirty_sync_count,
        "postcopy-requests": c.page_requests,
        "page-size": PAGE_SIZE,
        "multifd-bytes": c.multifd_bytes,
        "pages-per-second": round(c.pages_per_second),
        "precopy-bytes": at_pause,
        "downtime-bytes": at_postcopy - at_pause,
        "postcopy-bytes": c.on_main - at_postcopy,
        "dirty-sync-missed-zero-copy": 0,
    }


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
