"""What the Cancellation paragraphs of migrate() and receive() promise, status by status, and that it is so."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import trimig
from tests.engine.test_ownership import Struck, destination_agrees, source_agrees
from trimig import Status

#: Side, mode and status in which the caller's scope is cancelled; what the call ends by. None: by Cancelled, and it never
#: happened.
PROMISE: dict[tuple[str, str, str], type | None] = {
    **{
        ("source", mode, status): None
        for mode in ("precopy", "held", "postcopy")
        for status in ("setup", "active", "device")
    },
    ("source", "held", "pre-switchover"): None,
    **{("source", mode, "handover"): trimig.Summary for mode in ("precopy", "held", "postcopy")},
    **{("source", mode, "completed"): trimig.Summary for mode in ("precopy", "held", "postcopy")},
    ("source", "postcopy", "postcopy-active"): trimig.Summary,
    **{("destination", mode, status): None for mode in ("precopy", "postcopy") for status in ("setup", "active")},
    **{("destination", mode, "handover"): trimig.Summary for mode in ("precopy", "postcopy")},
    ("destination", "postcopy", "postcopy-active"): trimig.Summary,
    **{("destination", mode, "completed"): trimig.Summary for mode in ("precopy", "postcopy")},
}


@pytest.mark.parametrize(("side", "mode", "status"), PROMISE, ids=lambda part: part)
def test_a_cancellation_does_what_is_promised(side: str, mode: str, status: str) -> None:
    """rule C7: up to the decision it never happened; behind it, it is held off."""
    number = ("source", "destination").index(side)
    run = Struck(mode, number, status, "cancelled")
    trio.run(run.run, clock=trio.testing.MockClock(autojump_threshold=0))
    assert run.happened, "the status was never reached"
    promised = PROMISE[side, mode, status]
    end = run.sides[number].end
    assert isinstance(end, promised or type(None)), end
    source_agrees(run.here, "running")
    destination_agrees(run.there, "running")


@pytest.mark.parametrize("side", ["source", "destination"])
def test_while_the_connection_is_lost_a_cancellation_ends_the_call(side: str) -> None:
    """rule C7: nothing is held off while a recovery is only waited for."""
    number = ("source", "destination").index(side)
    run = Struck("postcopy", number, "postcopy-active", "reset")

    async def main() -> None:
        struck = run.struck.monitor

        def paused(event: trimig.Event) -> None:
            if event.name == "MIGRATION" and event.data["status"] == Status.POSTCOPY_PAUSED.value:
                run.struck.scope.cancel("the test")

        struck.add_listener(paused)
        await run.run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert isinstance(run.struck.end, trimig.PostcopyLost)
    source_agrees(run.here, "running")
    destination_agrees(run.there, "running")


@pytest.mark.parametrize("call", [trimig.migrate, trimig.receive])
def test_the_paragraph_speaks_of_postcopy(call: object) -> None:
    text = (call.__doc__ or "").partition("**Cancellation:**")[2]
    for words in ("up to the decision", "held off", "In postcopy", "PostcopyLost", "HandoverUncertain"):
        assert words in " ".join(text.split())
