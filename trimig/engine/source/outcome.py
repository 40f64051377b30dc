"""How an outgoing migration ends: the guest first, then the connection, then one error or a summary."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Final, NoReturn

from ... import formats
from ...channel import closing
from ...channel.channels import MULTIFD
from ...errors import (
    GuestNotResumed,
    InternalError,
    MigrationCancelled,
    Ownership,
    PeerFailed,
    TransportFailed,
    TrimigError,
)
from ...monitor.statistics import Downtime, Summary
from ...status import IN_POSTCOPY, Role, Status, end_of
from ...wire import encoder as wire
from ...wire.marks import Mark, reason_bytes
from ..outcome import bare, domain_error, judged, lost_by_cancellation
from . import hints, uncertain
from .throttle import end_throttle

if TYPE_CHECKING:
    from ...channel.channels import Channels
    from ...monitor.core import MonitorCore
    from .outgoing import Outgoing

log = logging.getLogger("trimig.source")

#: Seconds for sending the reason of the end to the destination. The guest has been resumed before.
_REASON_SECONDS: Final = 0.25


async def unwind(out: Outgoing, failure: BaseException | None) -> GuestNotResumed | None:
    """Set the status, resume the guest if it stays here, and then close the connections.

    The status decides which side owns the guest. The guest comes first, because it must not wait for the network; it is
    not throttled any more.

    Returns:
        The failure, if the guest could not be resumed.
    """
    monitor = out.monitor
    hints.explain(out, failure)
    if monitor.status is Status.HANDOVER:
        if failure is not None and (error := domain_error(failure, monitor.owner)) is not None:
            monitor.counters.error = str(error)
        monitor.advance(Status.FAILED if out.commit_not_sent else Status.UNCERTAIN)
    elif failure is not None or monitor.status in IN_POSTCOPY:
        end_status(monitor, failure)
    guest_failure: GuestNotResumed | None = None
    try:
        if monitor.owner is Ownership.SOURCE:
            guest_failure = await uncertain.resume_here(out)
        await end_throttle(out)
    finally:
        try:
            await clean_up(out)  # behind the guest: it takes the longer, the more memory there is
        finally:
            await give_reason(out, failure)
            await out.link.channels.close(out.config.teardown_grace if monitor.status is Status.COMPLETED else 0.0)
    return guest_failure


def end_status(monitor: MonitorCore, failure: BaseException | None) -> None:
    """Set the status of an attempt that ended with *failure*, before its outcome is reported."""
    error = domain_error(failure, monitor.owner) if failure is not None else None
    cancelled = failure is not None and error is None
    if error is not None:
        monitor.counters.error = str(error)  # first, because a status that shows an error is never without one
    if (end := end_of(Role.SOURCE, monitor.status, cancelled=cancelled)) is not None:
        monitor.advance(end)


async def give_reason(out: Outgoing, failure: BaseException | None) -> None:
    """Send the reason of the end to a destination that is a trimig, if the stream can be brought to an element boundary."""
    channel = out.link.channel
    if out.monitor.owner is not Ownership.SOURCE or not out.link.reader.marked:
        return
    error = domain_error(failure, out.monitor.owner) if failure is not None else None
    if isinstance(error, PeerFailed | TransportFailed) or (rest := channel.mend()) is None:
        return
    text = (
        str(error) if error is not None else f"it was cancelled: {out.monitor.cancel_reason or 'no reason was given'}"
    )
    # At the boundary a destination may wait for the data channels. They were given up, so it finds their end instead.
    await out.link.channels.close_of(MULTIFD)
    boundary = b"".join(section.boundary for section in out.sections)
    last = rest + boundary + wire.command(Mark.REASON, reason_bytes(text))
    await closing.farewell(channel, last, min(_REASON_SECONDS, out.config.teardown_grace))


async def clean_up(out: Outgoing) -> None:
    """Release what the sections hold.

    **Cancellation:** held off, for at most ``teardown_grace``.
    """
    for section in out.sections:
        try:
            await closing.bounded(section.cleanup, out.config.teardown_grace, None)
        except TrimigError as error:
            out.monitor.warn(str(error))  # only a warning, because it changes nothing for the guest


async def conclude(out: Outgoing, failure: BaseException | None, guest_failure: GuestNotResumed | None) -> None:
    """Set the final status, and raise the error of the attempt. Returns for a migration that succeeded."""
    monitor = out.monitor
    error = domain_error(failure, monitor.owner) if failure is not None else None
    if monitor.status is Status.COMPLETED and error is not None:
        monitor.warn(f"the guest was handed over; behind that: {error}")
        return
    if monitor.status is Status.UNCERTAIN:
        await uncertain.report(out, error)
        return
    if guest_failure is not None:
        if error is not None:
            guest_failure.complete(error)
        if monitor.status is not Status.FAILED:
            monitor.advance(Status.FAILED)
        out.counters.error = str(guest_failure)
        raise guest_failure
    if error is None and failure is None and monitor.status is Status.FAILED:
        error = TransportFailed(
            f"the transport took nothing of the decision within {formats.duration(out.config.handover_timeout)}"
        )
    raise_outcome(monitor, error, failure)


async def end_unconnected(monitor: MonitorCore, channels: Channels, failure: BaseException | None) -> NoReturn:
    """End an attempt that got no connection. The guest was not touched.

    **Cancellation:** held off.
    """
    if failure is not None:
        end_status(monitor, failure)
    await channels.close()
    raise_outcome(monitor, domain_error(failure, monitor.owner) if failure is not None else None, failure)
    raise InternalError("the attempt ended without a connection and without an error")


def raise_outcome(monitor: MonitorCore, error: TrimigError | None, failure: BaseException | None) -> None:
    """Set the final status of an attempt that is not uncertain, and raise its error. Returns if there is no error.

    Args:
        error: the domain error for *failure*; None for a cancellation, or without a failure.
    """
    counters = monitor.counters
    if monitor.status is Status.CANCELLING:
        monitor.advance(Status.CANCELLED)
        if error is not None:
            counters.error = str(error)
            raise error
        if monitor.cancel_reason is not None:
            raise MigrationCancelled(monitor.cancel_reason)
    error = error or lost_by_cancellation(failure, monitor.status)
    if error is not None:
        error = judged(error, monitor.status)
        counters.error = str(error)
        raise error
    if failure is not None:
        raise bare(failure)


def summary(out: Outgoing) -> Summary:
    c = out.counters
    for text in c.warnings:
        log.warning("%s", text)
    return Summary(
        role=Role.SOURCE,
        confirmed=out.confirmed,
        prepared=out.prepared,
        total_time=out.monitor.statistics().elapsed,
        setup_time=(c.setup_done or c.started) - c.started,
        downtime=c.downtime or 0.0,
        downtime_parts=dataclasses.replace(Downtime(), **out.parts),
        iterations=c.iteration,
        bytes_transferred=c.transferred,
        normal_pages=c.normal,
        zero_pages=c.duplicate,
        ram_bytes=c.total,
        dirty_tracking=c.dirty_tracking,
        warnings=tuple(c.warnings),
        convergence=c.convergence,
        encoded_pages=c.encoded,
        encoded_bytes=c.encoded_bytes,
        encodings=tuple(c.encodings.values()),
        data_channels=c.data_channels,
        multifd_bytes=c.multifd_bytes,
    )
