"""The fence where memory is to follow: the answer to the package is lost, and a recovery may give it as well."""

from __future__ import annotations

import trio
import trio.testing

import trimig
from tests.engine.test_recovery import Told
from trimig.channel.connections import Connections
from trimig.engine.order import PING_LOADED, PING_RUNS
from trimig.engine.source import migrate_stream
from trimig.errors import Ownership
from trimig.status import Status
from trimig.wire import encoder as wire
from trimig.wire.return_path import Pong, encode


class Fenced(Told):
    """A source whose fence fails."""

    async def run(self) -> None:
        ways = Connections(first=self._next, again=lambda _: self._next())
        try:
            self.outcome = await migrate_stream(self.guest, ways, self.config, self.monitor, fence=self.fence)
        except trimig.TrimigError as error:
            self.outcome = error

    async def fence(self) -> Ownership:
        assert self.monitor.status is Status.POSTCOPY_UNCERTAIN
        raise OSError("no route to host")

    async def lose_the_answer(self) -> None:
        """The first connection, up to the PINGs in the package, which are not answered; then it is lost."""
        peer = await self.accept()
        read = b""
        said = 0
        head = wire.ping(0)[:5]
        while wire.ping(PING_LOADED) not in read:
            read += await peer.stream.receive_some()
            found = [read[i + 5 : i + 9] for i in range(len(read)) if read.startswith(head, i) and len(read) >= i + 9]
            for value in found[said:]:
                if int.from_bytes(value) not in (PING_LOADED, PING_RUNS):
                    await peer.say(encode(Pong(value=int.from_bytes(value))))
            said = len(found)
        await peer.stream.aclose()


async def test_a_fence_that_fails_leaves_it_to_the_recovery(autojump_clock: trio.testing.MockClock) -> None:
    """It knows no more than the source does: the next connection answers the question."""
    it = Fenced(recovery_retry=True)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.run)
            await it.lose_the_answer()
            await it.bring_to_an_end(await it.accept())
    assert isinstance(it.outcome, trimig.Summary), it.outcome
    assert any("no route to host" in text for text in it.outcome.warnings)
    assert it.guest.owner is trimig.Owner.ELSEWHERE
    at = it.statuses.index("handover")
    assert it.statuses[at : at + 3] == ["handover", "postcopy-uncertain", "postcopy-active"]
