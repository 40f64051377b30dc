"""The answer to the decision is missing: the fence is asked, or the question is left to the caller."""

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
    """The answer is missing. Ask the caller's fence; without a definite word raise HandoverUncertain."""
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
    uncertain.others = tuple(others)
    out.counters.error = str(uncertain)
    raise uncertain


async def ask_fence(out: Outgoing) -> Ownership:
    """What the caller's fence finds out; UNKNOWN without one.

    Raises:
        TrimigError: it failed.

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
    """The fence says that the destination does not have the guest: resume it here. Returns what is to be raised."""
    out.monitor.advance(Status.FAILED)  # the owner is certain now, also if the guest cannot be resumed
    failure: TrimigError | None = await resume_here(out)  # a GuestNotResumed
    if failure is None:
        how = "it runs here again" if out.paused_by_us else "it is as it was"
        failure = TransportFailed(f"the answer was lost ({why}); the fence gave the guest back, and {how}")
    failure.others = tuple(others)
    out.counters.error = str(failure)
    return failure


def why_no_answer(out: Outgoing) -> str:
    seconds = f"{formats.duration(out.config.handover_timeout)}"
    if out.link.answers:
        return f"nothing came for {seconds}"
    return f"the transport could not say within {seconds} that everything is where it was to go"


async def settle_by_error(out: Outgoing, owner: Owner) -> None:
    """What the error's own ``settle`` comes to: an old answer must not settle the question of a later attempt."""
    if out.settled:
        raise already_settled(out.guest.owner)
    await out.guest.settle(owner)


async def settle(out: Outgoing, owner: Owner) -> None:
    """What :meth:`trimig.guest.Guest.settle` comes to."""
    out.settled = True
    if owner is Owner.ELSEWHERE:
        out.monitor.advance(Status.COMPLETED)
        return
    out.monitor.advance(Status.FAILED)  # first: a guest that is not this side's is not resumed
    if (failure := await resume_here(out)) is not None:
        raise failure


async def resume_here(out: Outgoing) -> GuestNotResumed | None:
    """Let the guest run again if it was paused for this attempt; returns why it does not."""
    if not out.paused_by_us:
        return None
    failure = await guest_calls.bring_back("resumed", out.guest.resume, out.config.teardown_grace)
    if failure is not None and out.guest.run_state != "running":
        stands = GuestNotResumed(str(failure))
        stands.__cause__ = failure.__cause__
        return stands
    out.monitor.emit("RESUME")
    return None
