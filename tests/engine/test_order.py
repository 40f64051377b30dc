"""Every command at every place of a stream, and streams without one of their parts, for every kind of guest.

What is legal where is :data:`trimig.status.STREAM`. A command elsewhere is one RemoteProtocolError with its offset; the
source is told so and keeps its guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import trio

import trimig
from tests.engine.test_postcopy_bad_input import (
    ADVISE,
    ALL,
    CLOSE,
    HEAD,
    PACKAGE,
    PAGES,
    RAM,
    START,
    Destination,
    able,
    destination,
    devices,
    part,
)
from tests.engine.test_switch import at, going
from trimig.engine.destination.section import measure_device
from trimig.engine.order import item_of
from trimig.errors import Ownership, RemoteProtocolError
from trimig.guest import PAGE_SIZE
from trimig.guests.lazy_app import LazyAppGuest
from trimig.status import STREAM, Item, Stream, after
from trimig.testing import FakeDevice, LazyScriptedGuest
from trimig.wire import Command, Section
from trimig.wire import encoder as wire
from trimig.wire import events as ev
from trimig.wire import postcopy as pc
from trimig.wire.decoder import Decoder
from trimig.wire.devices import description, globalstate
from trimig.wire.return_path import Shut

END = wire.section_continue(Section.END, 2) + CLOSE
EOF = wire.end_of_stream()
TEXT = description.build(
    PAGE_SIZE, [FakeDevice("clock", size=8).describe(), globalstate.section("running").description or {}]
)
#: The parts of a stream by precopy whose source could have switched to postcopy, and where each of them leads to.
PARTS: list[tuple[str, bytes, Stream]] = [
    ("head", HEAD, Stream.SETUP),
    ("advise", ADVISE, Stream.SETUP_ADVISED),
    ("start", START, Stream.RAM_ADVISED),
    ("pages", part(*ALL[:4]), Stream.RAM_ADVISED),
    ("more pages", part(*ALL[4:]), Stream.RAM_ADVISED),
    ("end", END, Stream.DEVICES),
    ("devices", devices(), Stream.DEVICES),
]

COMMANDS: dict[int, bytes] = {
    0: b"",
    Command.OPEN_RETURN_PATH: b"",
    Command.PING: b"\0\0\0\x07",
    Command.POSTCOPY_ADVISE: ADVISE[5:],
    Command.POSTCOPY_LISTEN: b"",
    Command.POSTCOPY_RUN: b"",
    Command.POSTCOPY_RAM_DISCARD: b"\0\x03ram\0" + (0).to_bytes(8) + PAGE_SIZE.to_bytes(8),
    Command.ENABLE_COLO: b"",
    Command.POSTCOPY_RESUME: b"",
    Command.RECV_BITMAP: b"\x03ram",
    Command.SWITCHOVER_START: b"",
    12: b"",
    0x7FFF: b"x",
}
HARMLESS = (Command.OPEN_RETURN_PATH, Command.PING, Command.SWITCHOVER_START)


@contextlib.contextmanager
def application(kind: type[trimig.AppGuest]) -> Iterator[trimig.Guest]:
    with kind("scripted", running=False) as guest:
        guest.add_ram("ram", RAM["ram"])
        guest.add_device(FakeDevice("clock", size=8))
        yield guest


@contextlib.asynccontextmanager
async def made(kind: str) -> AsyncIterator[trimig.Guest]:
    match kind:
        case "application":
            with application(trimig.AppGuest) as guest:
                yield guest
        case "lazy application":
            with application(LazyAppGuest) as guest:
                yield guest
        case "scripted":
            yield LazyScriptedGuest(
                blocks=dict.fromkeys(RAM, PAGES), run_state="inmigrate", devices=[FakeDevice("clock", size=8)]
            )
        case _:
            with trimig.ParkedGuest() as parked:
                yield parked


KINDS = ["application", "lazy application", "scripted", "parked"]
ABLE = [kind for kind in KINDS if kind != "application"]


async def outcome(
    target: trimig.Guest, stream: bytes, *, postcopy: bool = True
) -> tuple[trimig.Summary | trimig.TrimigError, Destination]:
    """What comes of that stream; for an error, the source has been told it and keeps its guest."""
    config = able() if postcopy else trimig.Config(peer=able().peer)
    if isinstance(target, trimig.ParkedGuest):
        # Only its description tells where an unknown device ends.
        config = dataclasses.replace(config, peer=trimig.PeerProfile())
        stream += wire.description(TEXT)
    async with destination(target, config) as there:
        peer = await there.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.hear)
            with contextlib.suppress(trio.BrokenResourceError):
                await peer.say(stream)
                await peer.stream.send_eof()
    end = there.outcome
    assert end is not None
    if isinstance(end, trimig.Summary):
        assert Shut(status=0) in peer.heard
        assert target.run_state == ("paused" if isinstance(target, trimig.ParkedGuest) else "running")
        assert all((block.pages == 5).all() for block in target.ram)
    else:
        assert there.monitor.owner is Ownership.SOURCE
        assert target.run_state == "inmigrate"
        assert Shut(status=1) in peer.heard or wire.command(1) not in stream
    return end, there


def numbered(number: int) -> str:
    return Command(number).name if number in list(Command) else f"{number:#x}"


def is_legal(number: int, state: Stream) -> bool:
    return number in list(Command) and Item[Command(number).name] in STREAM[state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", COMMANDS, ids=numbered)
async def test_every_command_at_every_place(autojump_clock: trio.testing.MockClock, kind: str, number: int) -> None:
    """Legal and harmless, or refused with its offset."""
    able_here = kind != "application"
    for where in range(len(PARTS)):
        before = b"".join(data for name, data, _ in PARTS[: where + 1] if able_here or name != "advise")
        behind = b"".join(data for name, data, _ in PARTS[where + 1 :] if able_here or name != "advise")
        state = PARTS[where][2] if able_here or PARTS[where][2] is not Stream.RAM_ADVISED else Stream.RAM
        async with made(kind) as target:
            stream = before + wire.command(number, COMMANDS[number]) + behind + EOF
            end, _ = await outcome(target, stream, postcopy=able_here)
        if number in HARMLESS:
            assert isinstance(end, trimig.Summary), (PARTS[where][0], end)
            continue
        if number == Command.POSTCOPY_RAM_DISCARD and PARTS[where][0] == "start":
            assert isinstance(end, trimig.Summary) is able_here, end  # all of it comes behind
            continue
        assert isinstance(end, RemoteProtocolError), (PARTS[where][0], end)
        if not is_legal(number, state):
            assert end.offset == len(before), (PARTS[where][0], end)


@pytest.mark.parametrize("kind", ABLE)
async def test_a_package_at_every_place(autojump_clock: trio.testing.MockClock, kind: str) -> None:
    """Where it is not legal, nothing of it is acted on."""
    for where, (name, _, state) in enumerate(PARTS):
        before = b"".join(data for _, data, _ in PARTS[: where + 1])
        if state is Stream.RAM_ADVISED:
            continue  # tests/engine/test_postcopy_bad_input.py has those
        async with made(kind) as target:
            end, _ = await outcome(target, before + PACKAGE + part(*ALL) + END + EOF)
        assert isinstance(end, RemoteProtocolError), (name, end)
        if kind == "parked" and state is Stream.DEVICES:
            assert end.offset is not None  # devices that are unknown go on until something cannot be one
            assert end.offset >= len(before)
        else:
            assert end.offset == len(before), (name, end)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opened", [True, False], ids=["two ways", "one way"])
async def test_a_guest_without_its_ram(autojump_clock: trio.testing.MockClock, kind: str, *, opened: bool) -> None:
    """A header, a configuration and an end are no guest, whatever devices come with it."""
    async with made(kind) as target:
        await check_without_ram(target, kind, opened=opened)


async def check_without_ram(target: trimig.Guest, kind: str, *, opened: bool) -> None:
    head = HEAD if opened else HEAD[: HEAD.index(wire.command(1))]
    empty = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([]) + CLOSE
    whole = part(*ALL)
    streams: dict[str, tuple[bytes, int | None]] = {
        "nothing": (head + EOF, len(head)),
        "devices only": (head + devices() + EOF, None),
        "no pages": (head + START + END + devices() + EOF, None),
        "an empty list": (head + empty + END + devices() + EOF, None),
        "an end without a beginning": (head + END + devices() + EOF, len(head)),
        "pages without a list": (head + whole + END + devices() + EOF, len(head)),
        "no end": (head + START + whole + devices() + EOF, None),
        "no end and no devices": (head + START + whole + EOF, len(head + START + whole)),
    }
    kept = ("an empty list", "no end", "no end and no devices")
    for name, (stream, offset) in streams.items():
        if kind == "parked" and name in kept:
            continue  # a machine without RAM, and a background snapshot
        end, _ = await outcome(target, stream, postcopy=kind != "application")
        assert isinstance(end, RemoteProtocolError), (name, end)
        if offset is not None:
            assert end.offset == offset, (name, end)


async def test_a_background_snapshot_has_no_end_of_its_ram(autojump_clock: trio.testing.MockClock) -> None:
    """A guest that is only kept may come as one, if all of its pages do."""
    async with made("parked") as target:
        end, _ = await outcome(target, HEAD + START + part(*ALL) + devices() + EOF)
        assert isinstance(end, trimig.Summary)
    async with made("parked") as target:
        end, _ = await outcome(target, HEAD + START + part(*ALL[:-1]) + devices() + EOF)
        assert isinstance(end, RemoteProtocolError)
        assert "1 pages of RAM block 'ram' were never received" in str(end)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_block_of_its_own_that_is_not_announced(autojump_clock: trio.testing.MockClock, kind: str) -> None:
    """A guest is whole with all of its own blocks, not with all that were announced."""
    if kind == "parked":
        return  # it has none of its own
    other = wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("rom", PAGE_SIZE)]) + CLOSE
    async with made(kind) as target:
        end, _ = await outcome(target, HEAD + other + END + devices() + EOF, postcopy=kind != "application")
    assert isinstance(end, RemoteProtocolError)
    assert "unknown RAM block 'rom'" in str(end)


@pytest.mark.parametrize("kind", ABLE)
async def test_discarded_and_never_sent_again(autojump_clock: trio.testing.MockClock, kind: str) -> None:
    """Pages that were discarded before an end by precopy are missing."""
    stale = np.zeros(PAGES, np.bool_)
    stale[[1, 5]] = True
    stream = HEAD + ADVISE + START + part(*ALL) + b"".join(pc.discards("ram", stale)) + END + devices() + EOF
    async with made(kind) as target:
        end, _ = await outcome(target, stream)
    assert isinstance(end, RemoteProtocolError)
    assert "2 pages of RAM block 'ram' were never received" in str(end)


def walked(data: bytes, guest: trimig.Guest, state: Stream = Stream.OPENING, before: Decoder | None = None) -> Stream:
    """The state behind *data*, whose every element is legal where it stands."""
    measure = functools.partial(measure_device, guest)
    decoder = Decoder(measure=measure, description=False, continues=before, buffer_bytes=2 * len(data))
    decoder.accept_marks()
    decoder.feed(data)
    while (event := decoder.next_event()) is not None:
        state = after(state, item_of(event), offset=event.at)
        if isinstance(event, ev.PackageElement):
            state = walked(event.data, guest, state, decoder)
    assert not decoder.pending
    return state


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_source_sends_what_the_table_allows(autojump_clock: trio.testing.MockClock, *, postcopy: bool) -> None:
    """Element by element, to the end of the stream."""
    pair = going(rate=500.0 if postcopy else 0.0)
    if postcopy:
        at(pair.here, "setup", pair.here.start_postcopy)
    assert all(isinstance(end, trimig.Summary) for end in await pair.both())
    assert walked(pair.link.recorded("a->b"), pair.target) is Stream.ENDED
