"""What is raised at the end of a migration whose postcopy was lost: PostcopyLost, because the destination has the guest."""

from __future__ import annotations

import pytest
import trio

import trimig
from trimig.engine.outcome import judged, lost_by_cancellation
from trimig.status import Status


async def cancelled() -> BaseException:
    """Cancellations in a group in a group, as nurseries make them."""
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as error:
            kept = error
            raise
    return BaseExceptionGroup("outer", [BaseExceptionGroup("inner", [kept]), kept])


async def test_call_that_is_cancelled_while_the_connection_is_lost_raises_no_cancelled() -> None:
    found = lost_by_cancellation(await cancelled(), Status.POSTCOPY_LOST)
    assert isinstance(found, trimig.PostcopyLost)
    assert "cancelled while the connection was lost" in str(found)


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.POSTCOPY_LOST])
async def test_cancellation_in_another_status_stays_one(status: Status) -> None:
    assert lost_by_cancellation(await cancelled(), status) is None


async def test_interrupt_beside_a_cancellation_is_no_loss() -> None:
    both = BaseExceptionGroup("", [await cancelled(), KeyboardInterrupt()])
    assert lost_by_cancellation(both, Status.POSTCOPY_LOST) is None
    assert lost_by_cancellation(None, Status.POSTCOPY_LOST) is None


def test_any_error_of_a_lost_postcopy_is_postcopy_lost_with_its_cause() -> None:
    error = trimig.TransportFailed("the peer is gone")
    found = judged(error, Status.POSTCOPY_LOST)
    assert isinstance(found, trimig.PostcopyLost)
    assert "the peer is gone" in str(found)
    assert found.__cause__ is error
    assert error in found.others


def test_other_errors_stay_what_they_are() -> None:
    error = trimig.TransportFailed("the peer is gone")
    assert judged(error, Status.FAILED) is error
    lost = trimig.PostcopyLost("lost")
    assert judged(lost, Status.POSTCOPY_LOST) is lost
