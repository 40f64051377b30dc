"""What the source does if the answer to the decision is missing: it calls the fence, or the caller must settle the owner."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ... import formats
from ...channel import closing
from ...errors import (
    GuestNotResumed,
    HandoverUncertain,
    LocalProtocolError,
    Owner,
    Ownership,
    TransportFailed,
    TrimigError,
)
from ...owner import already_settled
from ...status import Status
from .. import guest_calls
from .answer import complete

if TYPE_CHECKING:
    from .outgoing import Outgoing


async def report(out: Outgoing, error: TrimigError | None) -> None:
    """Call the caller's fence for the owner. If the owner stays unknown, raise HandoverUncertain."""
    monitor = out.monitor
    why = str(error or out.link.reader.lost or why_no_answer(out))
    settled = Ownership.UNKNOWN
    others: list[BaseException] = [error] if error is not None else []
    try:
        settled = await ask_fence(out)
    except TrimigError as failed:
        why = f"{why}; {failed}"
        others.append(failed)
    if settled is Ownership.DESTINATION:
        complete(out)
        monitor.warn(f"the answer was lost ({why}); the fence found the guest at the destination")
        return
    if settled is Ownership.SOURCE:
        raise await give_back(out, why, others)
    uncertain = HandoverUncertain(
        f"the guest was handed over, but the answer is missing ({why}): the destination may be running it, so it "
        "stays paused here. Look at the destination, then settle who owns the guest",
        settle=functools.partial(settle_by_error, out),
    )
    out.guest.set_owner(Owner.UNKNOWN, settle=functools.partial(settle, out))
    uncertain.complete(*others)
    out.counters.error = str(uncertain)
    raise uncertain


async def ask_fence(out: Outgoing) -> Ownership:
    """The owner that the caller's fence returns; UNKNOWN without a fence, or if it takes longer than the limit.

    Raises:
        TrimigError: the fence failed.

    **Cancellation:** held off, for at most ``handover_timeout``.
    """
    if out.fence_hook is None:
        return Ownership.UNKNOWN
    fence = functools.partial(out.call, "the fence hook", out.fence_hook)
    found: object = await closing.bounded(fence, out.config.handover_timeout, Ownership.UNKNOWN)
    if not isinstance(found, Ownership):
        raise LocalProtocolError(f"the fence hook must return a trimig.Ownership, not {found!r}")
    return found


async def give_back(out: Outgoing, why: str, others: Sequence[BaseException]) -> TrimigError:
    """Resume the guest here, because the fence says that this side owns it. Returns the error to raise."""
    out.monitor.advance(Status.FAILED)  # before the resume: the owner is certain even if the resume fails
    failure: TrimigError | None = await resume_here(out)  # a GuestNotResumed
    if failure is None:
        how = "it runs here again" if out.paused_by_us else "it is as it was"
        failure = TransportFailed(f"the answer was lost ({why}); the fence gave the guest back, and {how}")
    failure.complete(*others)
    out.counters.error = str(failure)
    return failure


def why_no_answer(out: Outgoing) -> str:
    seconds = f"{formats.duration(out.config.handover_timeout)}"
    if out.link.answers:
        return f"nothing came for {seconds}"
    return f"the transport could not say within {seconds} that everything is where it was to go"


async def settle_by_error(out: Outgoing, owner: Owner) -> None:
    """The function behind ``settle`` of the error. It works once, so that an old error cannot settle a later attempt."""
    if out.settled:
        raise already_settled(out.guest.owner)
    await out.guest.settle(owner)


async def settle(out: Outgoing, owner: Owner) -> None:
    """The function behind :meth:`trimig.guest.Guest.settle`."""
    out.settled = True
    if owner is Owner.ELSEWHERE:
        out.monitor.advance(Status.COMPLETED)
        return
    out.monitor.advance(Status.FAILED)  # before the resume: the owner must be HERE for that
    if (failure := await resume_here(out)) is not None:
        raise failure


async def resume_here(out: Outgoing) -> GuestNotResumed | None:
    """Resume the guest if it was paused for this attempt. Returns the failure, if it does not run."""
    if not out.paused_by_us:
        return None
    failure = await guest_calls.bring_back("resumed", out.guest.resume, out.config.teardown_grace)
    if failure is not None and out.guest.run_state != "running":
        stands = GuestNotResumed(str(failure))
        stands.__cause__ = failure.__cause__
        return stands
    out.monitor.emit("RESUME")
    return None
