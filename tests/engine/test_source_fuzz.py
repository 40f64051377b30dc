"""Destinations that break the rules of a recovery, from a seed, and a source that must bear them.

The destination is played. It has the guest; what it says behind RECV_BITMAP and RESUME is drawn by lot: the right messages in
any order, marks between trimigs, changed bytes, and an end at any place. Whatever comes, the source is paused or goes on,
its guest stays the destination's, and only a sound recovery with a last word completes it.
"""

from __future__ import annotations

import collections
import contextlib
import random

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests import tiers
from tests.engine.test_postcopy_bad_input import END, PAGES, Peer
from tests.engine.test_recovery import Told
from tests.fuzzed import Fuzzed
from trimig.guest import PAGE_SIZE
from trimig.wire.marks import PING_MARK, PONG_MARK, Mark
from trimig.wire.return_path import PageRequest, Pong, ReceivedPages, ResumeAck, Shut, encode

INPUTS = 300
MANY = 6_000  # ten minutes on an idle machine, and the limit is thirty
#: A virtual day: nothing may hang.
LIMIT = 86_400.0
#: Bad connections of one input, at most.
BAD = 4


def header(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return kind.to_bytes(2) + (len(payload) if length is None else length).to_bytes(2) + payload


def bitmap(have: list[int], block: str = "ram", pages: int = PAGES) -> bytes:
    marks = np.zeros(pages, np.bool_)
    marks[have] = True
    return encode(ReceivedPages(block=block, pages=marks))


def message(chosen: random.Random) -> bytes:
    """One thing that a destination might say."""
    have = [page for page in range(PAGES) if chosen.random() < 0.5]
    mark = chosen.choice(list(Mark))
    at = chosen.choice((0, 1, PAGE_SIZE, (PAGES - 1) * PAGE_SIZE, PAGES * PAGE_SIZE, 1 << 63, 2**64 - PAGE_SIZE))
    right = (bitmap(have), encode(ResumeAck()), encode(Pong(value=PING_MARK)), encode(Pong(value=PONG_MARK)))
    others = (
        encode(Shut(status=0)), encode(Shut(status=1)), encode(Shut(status=chosen.getrandbits(32))),
        encode(Pong(value=chosen.choice((1, 2, 3, 4, 0x42)))), encode(Pong(value=chosen.getrandbits(32))),
        encode(PageRequest(block="ram", start=chosen.randrange(PAGES) * PAGE_SIZE, length=PAGE_SIZE)),
        header(3, b"\0" * 8 + b"\0\0\x10\0" + b"\3ram"), header(4, at.to_bytes(8) + chosen.getrandbits(32).to_bytes(4)),
        bitmap([], block="rom"), bitmap([0], pages=3), bitmap(have)[: chosen.randrange(1, 30)],
        header(5, b"\3ra"), header(5, b"\xff"), header(6, b""), header(6, bytes(4)),
        header(mark, chosen.randbytes(chosen.choice((0, 1, 7, 8, 15, 16, 17, 512)))),
        header(mark, chosen.randbytes(8), chosen.choice((0, 513, 65535))), header(Mark.REASON, b"why \xff\x1b[2J\n"),
        header(Mark.CLOCK, bytes(8)) * 20, header(Mark.ATTEMPT, bytes(16)),
        header(chosen.randrange(65536), chosen.randbytes(chosen.randrange(40))), chosen.randbytes(chosen.randrange(1, 200)),
    )  # fmt: skip
    return chosen.choice(right if chosen.random() < 0.4 else others)


def said(chosen: random.Random) -> list[bytes]:
    """What the destination says on one connection, in pieces."""
    match chosen.randrange(3):
        case 0:
            return [message(chosen) for _ in range(chosen.randrange(6))]
        case 1:  # nearly right
            sound = [encode(Pong(value=PING_MARK)), encode(Pong(value=PONG_MARK)), bitmap([0, 1]), encode(ResumeAck())]
            if chosen.random() < 0.5:
                sound.insert(chosen.randrange(5), message(chosen))
            if chosen.random() < 0.4:
                sound.pop(chosen.randrange(len(sound)))
            return sound
        case _:
            changed = bytearray(bitmap([2, 3]) + encode(ResumeAck()))
            changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
            return [bytes(changed[:-4]), bytes(changed[-4:])]


class Fuzzing(Told):
    """One source, and a destination that breaks the rules on some connections."""

    def __init__(self, seed: int) -> None:
        super().__init__(recovery_retry=True, recovery_timeout=LIMIT / 2)
        self.chosen = random.Random(seed)
        self.bad = self.resumed = 0
        self.read = bytearray()  # on the present connection
        self.early = False
        self.monitor.add_listener(self._look)

    def _look(self, event: trimig.Event) -> None:
        if event.name == "MIGRATION" and event.data["status"] == "postcopy-active":
            self.resumed += 1

    async def play(self) -> None:
        """Bad connections, and then a sound one."""
        await self.take()
        for _ in range(self.chosen.randrange(1, BAD + 1)):
            peer = await self.accept()
            await self._speak(peer)
            if "completed" in self.statuses:
                # It was an answer to the end of the memory, as the destination of a sound recovery gives it.
                assert END[-6:] in self.read, "completed without the end of the memory"
                self.early = True
                return
            self._still_elsewhere()
            self.bad += 1
        await self.bring_to_an_end(await self.accept())

    async def _speak(self, peer: Peer) -> None:
        """On one connection, until the source is paused again."""
        pieces, chosen = said(self.chosen), self.chosen
        before = self._pauses
        self.read.clear()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if chosen.random() < 0.7:
                self.read += await peer.stream.receive_some()  # its first commands
            wait = chosen.choice((0, 0, 0.001, 0.01, 1))
            for piece in pieces:
                cut = chosen.choice((0, chosen.randrange(len(piece) + 1)))
                await peer.stream.send_all(piece[:cut])
                await self._paused(before, wait)
                await peer.stream.send_all(piece[cut:])
            await self._paused(before, chosen.choice((0.001, 0.01, 1, 100)))
            if chosen.random() < 0.4:
                await peer.stream.send_all(encode(Shut(status=0)))
                await self._paused(before, 1)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while (seconds := trio.move_on_after(0.1)) and not seconds.cancelled_caught:
                with seconds:
                    if not (data := await peer.stream.receive_some()):
                        break
                    self.read += data
        await peer.stream.aclose()
        await self._paused(before, LIMIT)
        assert self._pauses == before + 1 or "completed" in self.statuses

    @property
    def _pauses(self) -> int:
        return self.statuses.count("postcopy-paused")

    async def _paused(self, before: int, seconds: float) -> None:
        """Wait for one more pause than *before*, for at most *seconds*."""
        with trio.move_on_after(seconds):
            while self._pauses == before and "completed" not in self.statuses:
                await self.monitor.wait_changed()

    def _still_elsewhere(self) -> None:
        assert "completed" not in self.statuses
        assert self.guest.owner is trimig.Owner.ELSEWHERE
        assert not self.guest.running


async def one(seed: int) -> str:
    """One input; a word for how it went."""
    told = Fuzzing(seed)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told.run)
            await told.play()
    assert isinstance(told.outcome, trimig.Summary), told.outcome
    assert told.outcome.confirmed
    assert told.statuses.count("completed") == 1
    assert told.guest.owner is trimig.Owner.ELSEWHERE
    if told.early:
        return "ended early"
    return "resumed" if told.resumed > 2 else "refused"


@pytest.mark.slow
def test_what_a_destination_says_in_a_recovery(fuzzed: Fuzzed) -> None:
    """O6, O8: paused again or resumed, never completed without the last word, and no error without a type."""
    count = MANY if tiers.everything() else INPUTS
    ways: collections.Counter[str] = collections.Counter()
    for seed in range(count):
        try:
            ways[trio.run(one, seed, clock=trio.testing.MockClock(autojump_threshold=0))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    fuzzed("answers to a source's recovery", count)
    # Both kinds are among them, or the fuzz tests less than it says.
    assert ways["resumed"] > count // 20
    assert ways["refused"] > count // 4
