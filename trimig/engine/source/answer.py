"""The answer of the destination to the decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ...errors import PeerFailed
from ...status import Status

if TYPE_CHECKING:
    from .outgoing import Outgoing


def take_refusal(out: Outgoing) -> PeerFailed | None:
    """Act on the answer to the decision, if it has come. Returns the error for a refusal, else None.

    Without an answer this function does nothing; :func:`.outcome.unwind` then finds the outcome uncertain.
    """
    reader = out.link.reader
    code = reader.shut
    if code is None or out.answered or out.monitor.status is not Status.HANDOVER:
        return None
    out.answered = True
    if not code:
        out.confirmed = True
        complete(out)
        return None
    out.monitor.advance(Status.FAILED)
    return PeerFailed(f"the destination could not take the guest over (it sent SHUT {code}){reader.why}", code=code)


def complete(out: Outgoing) -> None:
    """Complete the migration: the destination has the guest. The downtime is set before the event of the status."""
    end_downtime(out)
    out.monitor.advance(Status.COMPLETED)


def complete_postcopy(out: Outgoing) -> None:
    """Complete a postcopy migration: the destination has the guest and all of its memory."""
    out.answered = out.confirmed = True
    out.counters.remaining = 0
    out.monitor.advance(Status.COMPLETED)


def end_downtime(out: Outgoing) -> None:
    """End the measurement of the downtime: the guest runs at the destination, as far as this side knows."""
    c = out.counters
    c.downtime = trio.current_time() - out.stopped_at
    out.parts["commit"] = c.downtime - sum(out.parts.values())
