"""The end of an incoming migration: the last message to the source, and the error or the summary for the caller."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...channel import closing
from ...channel.channels import MAIN
from ...errors import (
    HandoverUncertain,
    Loss,
    MigrationCancelled,
    PostcopyLost,
    RemoteProtocolError,
    TransportFailed,
    TrimigError,
)
from ...monitor import blockers
from ...monitor.statistics import Downtime, Summary
from ...status import ARRIVED_PAUSED, Role, Status, end_of
from ...wire.marks import reason_bytes
from ...wire.return_path import Reason, Shut, encode
from ..outcome import add_to_message, bare, domain_error, lost_by_cancellation
from .uncertain import uncertain

if TYPE_CHECKING:
    from ...wire.postcopy import Runs
    from .incoming import Incoming

log = logging.getLogger("trimig.destination")


async def unwind(into: Incoming, failure: BaseException | None) -> None:
    """Set the status of the end, send SHUT to the source, and close the connections.

    Args:
        failure: the exception that ended the attempt; None without one.

    **Cancellation:** held off, for at most ``teardown_grace``.
    """
    monitor = into.monitor
    _explain(into, failure)
    ended = monitor.status is not Status.COMPLETED
    if ended:
        error = domain_error(failure, monitor.owner) if failure is not None else None
        cancelled = error is None
        if error is not None:
            into.counters.error = str(error)  # first, because a status that shows an error is never without one
        if (end := end_of(Role.DESTINATION, monitor.status, cancelled=cancelled)) is not None:
            monitor.advance(end)
    monitor.listening()
    # The connections beside the main one are closed behind the last message: their end says less than it.
    into.reception.close()
    try:
        # No SHUT in ARRIVED_PAUSED: the source must not end its attempt, as it may still show which side owns the guest.
        if into.return_path and monitor.status not in ARRIVED_PAUSED:
            reason = _reason(into, failure) if ended and into.marked else b""
            await _say(into, reason + encode(Shut(status=1 if ended else 0)), arrived=not ended)
    finally:
        await into.channels.close(0.0 if ended else into.config.teardown_grace)


def _explain(into: Incoming, failure: BaseException | None) -> None:
    """Say in the error of a stream that ends too early what that means, if the source is a program on a connection."""
    error = domain_error(failure, into.monitor.owner) if failure is not None else None
    if isinstance(error, TransportFailed) and error.loss is Loss.CLOSED and into.return_path:
        add_to_message(error, "the source has ended, or the link broke")


async def _say(into: Incoming, message: bytes, *, arrived: bool) -> None:
    """Send the last message. *arrived*: the message confirms that the guest has arrived."""
    said = False
    for channel in into.channels.of(MAIN):  # there is no channel if the connection was lost
        said = await closing.farewell(channel, message, into.config.teardown_grace)
    if arrived:
        into.confirmed = said
        if not said:
            into.monitor.warn("the source could not be told that the guest has arrived: it will report it unknown")


def _reason(into: Incoming, failure: BaseException | None) -> bytes:
    """The message with the reason of the refusal, for a source that is a trimig."""
    error = domain_error(failure, into.monitor.owner) if failure is not None else None
    cancelled = f"it was cancelled: {into.monitor.cancel_reason or 'no reason was given'}"
    text = str(error) if error is not None else cancelled
    if (hint := into.reception.hint()) is not None and isinstance(error, TransportFailed | RemoteProtocolError):
        text = f"{hint}; {text}"
    return encode(Reason(payload=reason_bytes(text)))


def conclude(into: Incoming, failure: BaseException | None, missing: Mapping[str, Runs]) -> None:
    """Raise the one error for an attempt that has not succeeded.

    Args:
        missing: the missing pages of the guest, by block.
    """
    monitor = into.monitor
    if monitor.status is Status.COMPLETED:
        return  # the guest has arrived: a later cancellation or error has no effect
    error = domain_error(failure, monitor.owner) if failure is not None else None
    if monitor.status is Status.CANCELLING:
        monitor.advance(Status.CANCELLED)
        if error is None and monitor.cancel_reason is not None:
            error = MigrationCancelled(monitor.cancel_reason)
    hint = into.reception.hint()
    if hint is not None and isinstance(error, TransportFailed | RemoteProtocolError | MigrationCancelled):
        add_to_message(error, hint)
    error = _judged(into, error or lost_by_cancellation(failure, monitor.status), missing)
    if error is not None:
        into.counters.error = str(error)
        raise error
    assert failure is not None
    raise bare(failure)


def _judged(into: Incoming, error: TrimigError | None, missing: Mapping[str, Runs]) -> TrimigError | None:
    """The error for the final status of an attempt that has failed with *error*."""
    status = into.monitor.status
    if status not in ARRIVED_PAUSED:
        return error
    lacks = into.counters.missing = {
        name: [(first, end) for first, end in runs.tolist()] for name, runs in missing.items()
    }
    blockers.lacks(into.guest, sum(end - first for runs in lacks.values() for first, end in runs))
    found: HandoverUncertain | PostcopyLost | TrimigError | None = error
    if status is Status.UNCERTAIN:
        found = uncertain(into, error)
    elif error is not None:
        found = _lost(error, lacks)
    return found


def _lost(error: TrimigError, missing: Mapping[str, Sequence[tuple[int, int]]]) -> PostcopyLost:
    """The error for a guest that is here and will never have all of its memory, with the missing pages."""
    pages = sum(end - first for runs in missing.values() for first, end in runs)
    lost = PostcopyLost(
        f"{error}; {pages} pages of the guest's memory never came, and it stands still", missing=missing
    )
    lost.complete(error, *error.others)
    return lost


def summary(into: Incoming) -> Summary:
    """The summary of an attempt that has succeeded. Logs its warnings."""
    c = into.counters
    for text in c.warnings:
        log.warning("%s", text)
    assert c.finished is not None
    connected = c.started if c.setup_done is None else c.setup_done
    parts = dataclasses.replace(Downtime(), resume=into.resume_seconds)
    return Summary(
        role=Role.DESTINATION,
        confirmed=into.confirmed,
        prepared=into.prepared,
        total_time=c.finished - connected,
        setup_time=0.0,
        downtime=parts.total,
        downtime_parts=parts,
        iterations=0,
        bytes_transferred=c.transferred,
        normal_pages=c.normal,
        zero_pages=c.duplicate,
        ram_bytes=c.total,
        dirty_tracking="",
        warnings=tuple(c.warnings),
        data_channels=c.data_channels,
        multifd_bytes=c.multifd_bytes,
        waiting_time=connected - c.started,
    )
