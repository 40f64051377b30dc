"""Streams that break the rules of postcopy, byte by byte, into a destination: one error with its place, nothing lost.

Before the package is acted on the source keeps its guest and is told so; behind it the migration is paused, and a later
connection makes it good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import AsyncIterator

import numpy as np
import pytest
import trio

import trimig
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.errors import GuestFailed, Ownership, PostcopyLost, RemoteProtocolError
from trimig.guest import PAGE_SIZE, DeviceSection
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, LazyScriptedGuest, ScriptedGuest, virtual_link
from trimig.wire import Command, RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.constants import RamFlag
from trimig.wire.devices import globalstate
from trimig.wire.pages.xbzrle import record_content
from trimig.wire.return_path import Pong, ResumeAck, ReturnPathDecoder, Shut

PAGES = 8
LIMIT = 30
RAM = {"ram": PAGES * PAGE_SIZE}


def able() -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True),
        peer=dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=True),
        handover_timeout=2.0,
        teardown_grace=1.0,
        stall_timeout=5.0,
    )


def guest() -> LazyScriptedGuest:
    return LazyScriptedGuest(
        blocks={"ram": PAGES}, run_state="inmigrate", devices=[FakeDevice("clock", size=8)], touches=[]
    )


# -- the pieces of a stream --------------------------------------------------------------------------------------------

HEAD = wire.file_header() + wire.configuration("scripted", ()) + wire.command(1) + wire.ping(1)
ADVISE = pc.advise(pc.Advice())
CLOSE = wire.END_WORD + wire.section_footer(2)
START = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", RAM["ram"])]) + CLOSE
LISTEN, RUN = wire.command(Command.POSTCOPY_LISTEN), wire.command(Command.POSTCOPY_RUN)
OPENING = HEAD + ADVISE + START


def part(*pages: int, fill: int = 5) -> bytes:
    """A section with these pages."""
    data = np.full((len(pages), PAGE_SIZE), fill, np.uint8)
    records = RecordWriter().page_records("ram", np.array(pages, np.int64) * PAGE_SIZE, data)
    return wire.section_continue(Section.PART, 2) + records + CLOSE


def discard(*pages: int) -> bytes:
    stale = np.zeros(PAGES, np.bool_)
    stale[list(pages)] = True
    return b"".join(pc.discards("ram", stale))


def devices() -> bytes:
    device = DeviceSection(idstr="clock", instance_id=0, version_id=1, payload=FakeDevice("clock", size=8).save())
    state = globalstate.section("running")
    return wire.device_section(device, 4) + wire.device_section(state, 5)


DELTA = (
    wire.section_continue(Section.PART, 2)
    + RecordWriter().records("ram", np.array([3 * PAGE_SIZE]), RamFlag.XBZRLE, [record_content(b"\0\1\7")])
    + CLOSE
)
PACKAGE = pc.packaged(LISTEN + devices() + wire.ping(3) + RUN)
ALL = tuple(range(PAGES))
END = wire.section_continue(Section.END, 2) + CLOSE + wire.end_of_stream()


class Peer:
    """The source's end of a connection."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.decoder = ReturnPathDecoder(RAM)
        self.heard: list[object] = []

    async def say(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def hear(self) -> None:
        """Everything up to the end, or the break, of the connection."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some():
                self.heard += self.decoder.feed(data)

    async def hear_end(self) -> None:
        """Everything, of a stream that is not a return path."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self.stream.receive_some():
                pass

    async def hear_that_it_lives(self) -> None:
        """The answer to the PING inside the package."""
        while Pong(value=3) not in self.heard:
            self.heard += self.decoder.feed(await self.stream.receive_some())

    async def hear_until(self, kind: type) -> None:
        while not any(isinstance(message, kind) for message in self.heard):
            self.heard += self.decoder.feed(await self.stream.receive_some())


class Destination:
    """A receiver, and the connections that its source makes."""

    def __init__(self, target: trimig.Guest, config: trimig.Config | None = None) -> None:
        self.guest = target
        self.config = config or able()
        self.monitor = MonitorCore()
        self.outcome: trimig.Summary | trimig.TrimigError | None = None
        self._offers, self._taken = trio.open_memory_channel[AnyStream](4)
        self._offers_beside, self._taken_beside = trio.open_memory_channel[AnyStream](4)

    async def run(self) -> None:
        try:
            ways = Connections(first=self._next, again=lambda _: self._next(), beside=self._taken_beside.receive)
            self.outcome = await receive_stream(self.guest, ways, self.config, self.monitor)
        except trimig.TrimigError as error:
            self.outcome = error

    async def _next(self) -> AnyStream:
        return await self._taken.receive()

    async def connect(self) -> Peer:
        ours, theirs = virtual_link()
        await self._offers.send(theirs)
        return Peer(ours)

    async def connect_beside(self) -> Peer:
        """The second connection of postcopy-preempt."""
        ours, theirs = virtual_link()
        await self._offers_beside.send(theirs)
        return Peer(ours)

    async def reconnect(self) -> Peer:
        """As soon as it is paused."""
        await self.monitor.wait_status(Status.POSTCOPY_PAUSED)
        self.monitor.recover("again")
        return await self.connect()


@contextlib.asynccontextmanager
async def destination(
    target: trimig.Guest | None = None, config: trimig.Config | None = None
) -> AsyncIterator[Destination]:
    with trio.fail_after(LIMIT):
        there = Destination(target or guest(), config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run)
            yield there


async def refusal(stream: bytes, target: trimig.Guest | None = None, config: trimig.Config | None = None) -> Exception:
    """Why that stream is refused; the source is told so, and the guest has not run."""
    async with destination(target, config) as there:
        peer = await there.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hear)
            with contextlib.suppress(trio.BrokenResourceError):
                await peer.say(stream)
                await peer.stream.send_eof()
    assert isinstance(there.outcome, trimig.TrimigError), there.outcome
    assert there.monitor.owner is there.outcome.owner is Ownership.SOURCE
    assert Shut(status=1) in peer.heard
    assert not getattr(there.guest, "executed", False)
    return there.outcome


# -- before the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (HEAD + ADVISE + ADVISE, "no place between POSTCOPY_ADVISE and the list"),
        (HEAD + START + ADVISE, "POSTCOPY_ADVISE has no place between"),
        (HEAD + wire.command(Command.POSTCOPY_ADVISE), "turn the capability dirty-bitmaps off"),
        (HEAD + pc.advise(pc.Advice(page_sizes=0x201000)), "0x201000"),
        (HEAD + pc.advise(pc.Advice(target_page=8192)), "pages of 8192 bytes"),
        (HEAD + START + discard(1), "its place is .*, with postcopy announced"),
        (HEAD + START + PACKAGE, "its place is .*, with postcopy announced"),
        (OPENING + LISTEN, "POSTCOPY_LISTEN has no place"),
        (OPENING + RUN, "POSTCOPY_RUN has no place"),
        (OPENING + wire.command(Command.POSTCOPY_RESUME), "POSTCOPY_RESUME has no place"),
        (OPENING + wire.command(Command.RECV_BITMAP, b"\x03ram"), "RECV_BITMAP has no place"),
        (OPENING + pc.packaged(devices() + RUN), "does not begin with LISTEN"),
        (OPENING + pc.packaged(LISTEN + devices()), "does not end with RUN"),
        (OPENING + pc.packaged(LISTEN + devices() + RUN + wire.ping(3)), "goes on behind RUN"),
        (OPENING + pc.packaged(LISTEN + devices()[:-3]), "ends inside an element"),
        (OPENING + pc.packaged(LISTEN + wire.command(Command.ENABLE_COLO) + RUN), "wants COLO"),
        (OPENING + pc.packaged(LISTEN + part(1) + devices() + RUN), "in a package"),
        (OPENING + pc.packaged(LISTEN + RUN), "'clock' .* was never received"),
        (OPENING + PACKAGE[:30], "ends"),
        (OPENING + wire.command(Command.PACKAGED, struct.pack(">I", 0xFFFFFFFF)), "package of 4294967295 bytes"),
    ],
)
async def test_what_comes_before_the_guest_is_refused(stream: bytes, message: str) -> None:
    """P4, T1: and the source may go on."""
    error = await refusal(stream)
    with pytest.raises(type(error), match=message):
        raise error


async def test_without_the_capability() -> None:
    """S7: what to do is in the message."""
    error = await refusal(OPENING, config=dataclasses.replace(able(), capabilities=trimig.Capabilities()))
    assert "turn it on on both sides" in str(error)


async def test_guest_that_cannot_is_refused_before_a_peer_connects() -> None:
    """The GIL hazard: named, with the way out."""
    there = Destination(ScriptedGuest(run_state="inmigrate"))
    await there.run()
    assert isinstance(there.outcome, GuestFailed)
    assert "Python's global lock" in str(there.outcome)


class Forbidden(LazyScriptedGuest):
    """As on a host where userfaultfd is not permitted."""

    async def missing_memory(self):  # type: ignore[no-untyped-def]  # it never returns
        await trio.lowlevel.checkpoint()
        raise GuestFailed("userfaultfd is not permitted: vm.unprivileged_userfaultfd is 0")


async def test_no_userfaultfd_is_found_out_at_once_and_precopy_goes_on_working() -> None:
    """The sysctl is named while the guest still runs at the source."""
    target = Forbidden(blocks={"ram": PAGES}, run_state="inmigrate", devices=[FakeDevice("clock", size=8)])
    error = await refusal(HEAD + ADVISE, target)
    assert "vm.unprivileged_userfaultfd" in str(error)
    ours, theirs = virtual_link()
    source = ScriptedGuest(blocks={"ram": PAGES}, devices=[FakeDevice("clock", size=8)])
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimig.receive, target, theirs)
            await trimig.migrate(source, ours)
    assert target.running


async def test_advised_but_finished_in_precopy() -> None:
    """P2: a normal end, nothing of the preparations is left."""
    async with destination() as there:
        peer = await there.connect()
        end = wire.section_continue(Section.END, 2) + CLOSE
        await peer.say(OPENING + part(*ALL) + end + devices() + wire.end_of_stream())
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)
    assert there.guest.run_state == "running"


# -- behind it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (part(3) + part(3), "came a second time"),
        (part(2), "came a second time"),  # it came before the switch
        (DELTA, "page 3 of RAM block 'ram' came as a difference; in postcopy each page comes whole"),
        (END, "6 pages are missing"),
        (discard(1), "POSTCOPY_RAM_DISCARD has no place behind the switch"),
        (PACKAGE, "PACKAGED has no place behind the switch"),
        (wire.command(Command.POSTCOPY_RESUME), "POSTCOPY_RESUME has no place behind the switch"),
        (wire.command(Command.RECV_BITMAP, b"\x03ram"), "RECV_BITMAP has no place behind the switch"),
        (START, "a section START has no place behind the switch to postcopy"),
        (b"\x7f", "unknown section type"),
        (part(3)[:100], "ends"),
    ],
)
async def test_what_comes_behind_it_pauses_and_is_made_good(stream: bytes, message: str) -> None:
    """O6, O8, P12: the guest goes on, keeps what it has, and the next connection brings the rest."""
    target = guest()
    async with destination(target) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2, fill=1) + discard(1, 1) + discard(1) + PACKAGE)
        await peer.hear_that_it_lives()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hear)
            with contextlib.suppress(trio.BrokenResourceError):
                await peer.say(stream)
                await peer.stream.send_eof()
            again = await there.reconnect()
        assert target.running
        text = there.monitor.info()["error-desc"]
        assert message in text, text
        again.decoder.expect_bitmap("ram")
        await again.say(wire.command(Command.RECV_BITMAP, b"\x03ram") + wire.command(Command.POSTCOPY_RESUME))
        await again.hear_until(ResumeAck)
        (bitmap,) = [message.pages for message in again.heard if hasattr(message, "pages")]
        missing = np.flatnonzero(~bitmap).tolist()
        assert set(missing) <= {1, 3, 4, 5, 6, 7}
        await again.say(part(*missing, fill=9) + END)
        await again.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert (target.ram[0].pages[0, 0], target.ram[0].pages[2, 0], target.ram[0].pages[7, 0]) == (1, 1, 9)
    assert not target.overwritten


async def test_a_bitmap_of_a_block_that_is_not_there() -> None:
    """On the recovery connection; it is paused again."""
    async with destination() as there:
        peer = await there.connect()
        await peer.say(OPENING + PACKAGE)
        await peer.hear_that_it_lives()
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        there.monitor.pause("the test")
        again = await there.reconnect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.hear)
            await there.monitor.wait_status(Status.POSTCOPY_RECOVER)
            await again.say(wire.command(Command.RECV_BITMAP, b"\x03rom"))
            await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        assert "unknown RAM block 'rom'" in there.monitor.info()["error-desc"]
        there.monitor.abandon("enough")
    assert isinstance(there.outcome, PostcopyLost)
    assert dict(there.outcome.missing) == {"ram": [(0, PAGES)]}
    assert there.guest.run_state == "paused"
    assert isinstance(there.outcome.others[0], PostcopyLost | RemoteProtocolError)


async def test_a_page_that_cannot_be_placed_loses_the_guest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory left at the destination: it stands still, names what it lacks, and the source is not told that it is done."""

    def full(*_: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    async with destination() as there:
        peer = await there.connect()
        await peer.say(OPENING + PACKAGE)
        await peer.hear_that_it_lives()
        monkeypatch.setattr("trimig.testing.lazy.ScriptedMemory.place", full)
        await peer.say(part(3))
        await peer.hear()
    assert isinstance(there.outcome, PostcopyLost)
    assert "page 3 of RAM block 'ram' cannot be placed: Cannot allocate memory" in str(there.outcome)
    assert there.guest.run_state == "paused"
    assert not any(isinstance(message, Shut) for message in peer.heard)
