"""The error for a guest that has arrived and that its source may run as well, and the settlement of its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import GuestNotResumed, HandoverUncertain, Owner, Ownership, TrimigError
from ...owner import already_settled
from ...status import Status
from .. import guest_calls

if TYPE_CHECKING:
    from .incoming import Incoming


def uncertain(into: Incoming, error: TrimigError | None) -> HandoverUncertain:
    """The error for such a guest. The guest stays stopped here, with its devices, until its owner is settled.

    Args:
        error: the error that ended the connection.
    """
    question = _Question(into)
    found = HandoverUncertain(
        f"the guest has come, but the connection was lost ({error or 'no other came'}) before the source is known to have "
        "read that it runs here: the source may run it, so it stands still here. Look at the source, then settle who "
        "owns the guest",
        settle=question.settle_by_error,
        here=Ownership.DESTINATION,
    )
    into.guest.set_owner(Owner.UNKNOWN, settle=question.settle)
    if error is not None:
        found.complete(error)
    return found


class _Question:
    """The open question which side owns the guest of one attempt."""

    def __init__(self, into: Incoming) -> None:
        self._into = into
        self._settled = False

    async def settle_by_error(self, owner: Owner) -> None:
        """The function behind ``settle`` of the error. It works once, so that an old error cannot settle a later attempt.

        **Cancellation:** as for :meth:`settle`.
        """
        if self._settled:
            raise already_settled(self._into.guest.owner)
        await self._into.guest.settle(owner)

    async def settle(self, owner: Owner) -> None:
        """The function behind :meth:`trimig.guest.Guest.settle`. A guest with missing pages stays stopped in any case.

        Raises:
            GuestNotResumed: this side owns the guest, and could not resume it.

        **Cancellation:** held off, for at most ``teardown_grace``.
        """
        into = self._into
        self._settled = True
        if owner is Owner.ELSEWHERE:
            into.monitor.advance(Status.FAILED)
            return
        whole = into.following.whole
        into.monitor.advance(Status.COMPLETED if whole else Status.POSTCOPY_LOST)
        if not whole or not into.stopped:
            return
        failure = await guest_calls.bring_back("resumed", into.guest.resume, into.config.teardown_grace)
        if failure is not None and into.guest.run_state != "running":
            raise GuestNotResumed(str(failure)) from failure.__cause__
        into.monitor.emit("RESUME")
