"""The answer of the destination to the decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ...errors import PeerFailed
from ...status import Status

if TYPE_CHECKING:
    from .outgoing import Outgoing


def take_refusal(out: Outgoing) -> PeerFailed | None:
    """Act on the answer to the decision, if it has come; without one, the frame finds the outcome uncertain."""
    code = out.reader.shut if out.reader is not None else None
    if code is None or out.answered or out.monitor.status is not Status.HANDOVER:
        return None
    out.answered = True
    if not code:
        out.confirmed = True
        complete(out)
        return None
    out.monitor.advance(Status.FAILED)
    assert out.reader is not None
    return PeerFailed(f"the destination could not take the guest over (it sent SHUT {code}){out.reader.why}", code=code)


def complete(out: Outgoing) -> None:
    """The guest is the destination's. The figures stand before a listener is told."""
    c = out.counters
    assert c.paused_at is not None
    c.downtime = trio.current_time() - c.paused_at
    out.parts["commit"] = c.downtime - sum(out.parts.values())
    out.monitor.advance(Status.COMPLETED)
