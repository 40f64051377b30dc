"""A destination alone, fed with bytes: what it makes of them, and what it answers."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.multifd_source import PAGES, destination
from tests.engine.pair import ACCEPTED, PREPARED, REFUSED, config, running, waiting
from trimig.engine.source.switchover import PING_PREPARE
from trimig.guest import DeviceSection
from trimig.status import Status
from trimig.testing import DribbleStream, FakeDevice, ScriptedGuest, VirtualLink
from trimig.wire import Section
from trimig.wire import encoder as wire
from trimig.wire.devices import description, globalstate
from trimig.wire.return_path import Pong, encode

OPENED = encode(Pong(value=1))
FOOTER = wire.section_footer(2)
CLOCK = FakeDevice("clock", size=8, seed=5)


def ram_list(*blocks: tuple[str, int]) -> bytes:
    """RAM START."""
    return wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list(blocks) + wire.END_WORD + FOOTER


def ram_end(records: bytes = b"") -> bytes:
    """RAM END with records in it."""
    return wire.section_continue(Section.END, 2) + records + wire.END_WORD + FOOTER


def zeros(*pages: int, block: str = "ram") -> bytes:
    """ZERO records."""
    return wire.RecordWriter().zero_records(block, np.array(pages, np.int64) * 4096)


def device(payload: bytes | None = None, *, idstr: str = "clock", version: int = 1, number: int = 4) -> bytes:
    """One FULL section."""
    payload = CLOCK.save() if payload is None else payload
    return wire.device_section(DeviceSection(idstr=idstr, version_id=version, payload=payload), number)


def text_about(*devices: FakeDevice) -> bytes:
    """The description."""
    return wire.description(description.build(4096, [d.describe() for d in devices]))


def parts(**changed: bytes) -> dict[str, bytes]:
    """A whole migration of two zero pages and a clock, by its parts; some of them replaced."""
    whole = {
        "header": wire.file_header(),
        "configuration": wire.configuration("scripted"),
        "opened": wire.command(1) + wire.ping(1),
        "list": ram_list(("ram", 2 * 4096)),
        "end": ram_end(zeros(0, 1)),
        "device": device(),
        "state": wire.device_section(globalstate.section("running"), 5),
        "prepare": wire.ping(PING_PREPARE),
        "decision": wire.end_of_stream(),
        "text": text_about(CLOCK),
    }
    assert set(changed) <= set(whole)
    return whole | changed


def stream(**changed: bytes) -> bytes:
    """The parts in a row."""
    return b"".join(parts(**changed).values())


class Fed:
    """How a destination ended that was fed."""

    def __init__(self, guest: ScriptedGuest | None = None, **options: Any) -> None:
        self.guest = guest or waiting(pages=2)
        self.monitor = trimig.Monitor()
        self.config = config(**options)
        self.answers = b""
        self.result: trimig.Summary | trimig.TrimigError | None = None

    async def feed(self, data: bytes, *, end: bool = True, piece: int = 0) -> Fed:
        """Feed *data*, then close the sending half (or stay silent); *piece* dribbles."""
        link = VirtualLink()
        near: trio.abc.HalfCloseableStream = DribbleStream(link.a, send=piece, receive=piece) if piece else link.a
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, link.b)
            with contextlib.suppress(trio.BrokenResourceError):
                await near.send_all(data)
                if end:
                    await near.send_eof()
            while answer := await near.receive_some(4096):
                self.answers += bytes(answer)
            await near.aclose()
        assert link.closed
        assert self.guest.claimed is None
        return self

    async def _receive(self, stream: trio.abc.HalfCloseableStream) -> None:
        try:
            self.result = await trimig.receive(self.guest, stream, self.config, monitor=self.monitor)
        except trimig.TrimigError as error:
            self.result = error

    def refused(self, kind: type[trimig.TrimigError], text: str = "", *, answers: bytes = OPENED) -> None:
        """It must have failed with this, told the source, and left the guest alone."""
        assert isinstance(self.result, kind), f"{self.result!r}"
        assert text in str(self.result)
        assert self.result.owner is trimig.Ownership.SOURCE
        assert self.monitor.status is Status.FAILED
        assert self.monitor.info()["error-desc"] == str(self.result)
        assert self.answers == answers + REFUSED
        assert not self.guest.executed


async def test_whole_stream(autojump_clock: trio.testing.MockClock) -> None:
    """P1, K5: PONG 1, PONG of the prepare step, SHUT 0; the guest runs with the state that came."""
    fed = await Fed().feed(stream())
    assert isinstance(fed.result, trimig.Summary)
    assert fed.answers == OPENED + PREPARED + ACCEPTED
    assert fed.guest.running
    assert not fed.guest.ram[0].pages.any()
    assert fed.guest.devices is not None
    assert fed.guest.devices["clock", 0].save() == CLOCK.save()
    assert (fed.result.confirmed, fed.result.prepared, fed.result.warnings) == (True, True, ())


async def test_stream_that_dribbles(autojump_clock: trio.testing.MockClock) -> None:
    """Single bytes both ways make no difference."""
    fed = await Fed().feed(stream(), piece=1)
    assert fed.answers == OPENED + PREPARED + ACCEPTED
    assert fed.guest.running


async def test_source_without_a_prepare_step(autojump_clock: trio.testing.MockClock) -> None:
    """QEMU's own sources: PING 1 only."""
    fed = await Fed().feed(stream(prepare=b""))
    assert fed.answers == OPENED + ACCEPTED
    assert isinstance(fed.result, trimig.Summary)
    assert not fed.result.prepared


async def test_source_without_a_return_path(autojump_clock: trio.testing.MockClock) -> None:
    """K1: not a byte comes back."""
    fed = await Fed().feed(stream(opened=b"", prepare=b""))
    assert fed.answers == b""
    assert fed.guest.running
    assert isinstance(fed.result, trimig.Summary)
    assert not fed.result.confirmed
    fed = await Fed().feed(stream(opened=b"", prepare=b"", device=b""))
    assert fed.answers == b""
    assert isinstance(fed.result, trimig.RemoteProtocolError)


@pytest.mark.parametrize(
    ("stored", "autostart", "expected"),
    [
        ("running", True, "running"),
        ("running", False, "paused"),
        ("paused", True, "paused"),
        ("paused", False, "paused"),
        ("prelaunch", True, "prelaunch"),
        ("suspended", False, "suspended"),
    ],
)
async def test_run_state_that_the_stream_tells(
    autojump_clock: trio.testing.MockClock, stored: str, autostart: bool, expected: str
) -> None:
    """P9, M3."""
    fed = Fed(autostart=autostart)
    await fed.feed(stream(state=wire.device_section(globalstate.section(stored), 5)))
    assert fed.guest.run_state == expected


async def test_stream_without_a_stored_run_state_runs(autojump_clock: trio.testing.MockClock) -> None:
    """P9: as QEMU does with older machine types."""
    fed = await Fed().feed(stream(state=b""))
    assert fed.guest.running


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "text", "section"),
    [
        ({"list": ram_list(("rom", 8192))}, "unknown RAM block 'rom'", "ram"),
        ({"list": ram_list(("ram", 4096))}, "has 4 KiB (0x1000 bytes) at the source and 8 KiB (0x2000 bytes) at the destination", "ram"),
        ({"list": ram_list()}, "no RAM block 'ram'", "ram"),
        ({"end": ram_end(zeros(2))}, "", "ram"),
        ({"end": ram_end(zeros(0, block="rom"))}, "rom", "ram"),
        ({"end": ram_end(zeros(1))}, "1 pages of RAM block 'ram' were never received, the first at offset 0x0 of it (", None),
        ({"end": ram_end()}, "2 pages of RAM block 'ram' were never received, the first at offset 0x0 of it (", None),
        ({"device": device(idstr="watch")}, "unknown device 'watch'", "watch"),
        ({"device": device(version=2)}, "has version 2 at the source", "clock"),
        ({"device": b""}, "device 'clock' (instance 0) was never received", None),
        ({"device": device(b"123")}, "", "clock"),
        ({"state": device(b"\0\0\0\7" + b"debug".ljust(100, b"\0"), idstr="globalstate", number=5)}, "debug",
         "globalstate"),
        ({"prepare": wire.command(4)}, "POSTCOPY_LISTEN", None),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_refused_before_the_decision(
    autojump_clock: trio.testing.MockClock, changed: dict[str, bytes], text: str, section: str | None
) -> None:
    """P4, K4, Q9, gaps G13 and G18: SHUT 1, a typed error, and this process lives on."""
    fed = await Fed().feed(stream(**changed))
    fed.refused(trimig.RemoteProtocolError, text)
    assert isinstance(fed.result, trimig.RemoteProtocolError)
    assert fed.result.section == section


async def test_a_name_that_is_no_text_is_refused_with_its_place(autojump_clock: trio.testing.MockClock) -> None:
    """A guest that is only kept takes any names, but they must be text."""
    link = VirtualLink()
    head = wire.file_header() + wire.configuration("any", ())
    with trimig.ParkedGuest() as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                link.a.send_all, head + ram_list(("r\udcffm", 4096)) + ram_end(zeros(0, block="r\udcffm"))
            )
            with pytest.raises(trimig.RemoteProtocolError, match=r"of a RAM block is not UTF-8.*at byte 33 "):
                await trimig.receive(guest, link.b)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"configuration": wire.configuration("other")}, "machine 'other', this one is 'scripted'"),
        ({"header": b"QEVN" + wire.file_header()[4:]}, "QEVN"),
        ({"opened": wire.ping(1)}, "PING without a return path"),
    ],
)
async def test_what_does_not_fit_before_there_is_a_return_path(
    autojump_clock: trio.testing.MockClock, changed: dict[str, bytes], text: str
) -> None:
    """K4: the source cannot be told; the connection closes."""
    fed = await Fed().feed(stream(**changed))
    assert isinstance(fed.result, trimig.RemoteProtocolError)
    assert text in str(fed.result)
    assert fed.answers == b""
    assert not fed.guest.executed


async def test_description_that_is_no_json_takes_the_decision_back(autojump_clock: trio.testing.MockClock) -> None:
    fed = await Fed().feed(stream(text=wire.description(b"{nonsense")))
    fed.refused(trimig.RemoteProtocolError, answers=OPENED + PREPARED)


@pytest.mark.parametrize(("changed", "text"), [({"end": ram_end(zeros(1))}, "1 pages"), ({"device": b""}, "'clock'")])
async def test_completeness_can_be_a_warning(
    autojump_clock: trio.testing.MockClock, changed: dict[str, bytes], text: str
) -> None:
    """Q9: as QEMU, which does not look; but it is said."""
    fed = await Fed(completeness="warn").feed(stream(**changed))
    assert isinstance(fed.result, trimig.Summary)
    assert fed.answers == OPENED + PREPARED + ACCEPTED
    assert [warning for warning in fed.result.warnings if text in warning]


@pytest.mark.parametrize("error", [OSError("no memory"), ValueError("bad"), trimig.GuestFailed("jammed")])
async def test_device_that_fails_to_load(autojump_clock: trio.testing.MockClock, error: Exception) -> None:
    """P4."""
    fed = await Fed(waiting(pages=2, devices=[FakeDevice("clock", size=8, load_error=error)])).feed(stream())
    fed.refused(trimig.GuestFailed, str(error))


# -- streams that end, stall, or go on ---------------------------------------------------------------------------


async def test_stream_cut_at_every_byte(autojump_clock: trio.testing.MockClock) -> None:
    """P4, T5, T7, gap G13: one typed error up to the decision, and behind it the guest; then it can receive."""
    whole = stream()
    opened = len(stream(list=b"", end=b"", device=b"", state=b"", prepare=b"", decision=b"", text=b"")) - len(
        wire.ping(1)
    )
    prepared = len(stream(decision=b"", text=b""))
    for cut in range(len(whole)):
        fed = await Fed().feed(whole[:cut])
        if cut <= prepared:
            assert isinstance(fed.result, trimig.TransportFailed), f"cut at {cut}: {fed.result!r}"
            told = OPENED * (cut >= opened + len(wire.ping(1))) + PREPARED * (cut == prepared)
            assert fed.answers == told + REFUSED * (cut >= opened), f"cut at {cut}"
            assert not fed.guest.executed
            assert fed.monitor.info()["error-desc"] == str(fed.result) != ""
        else:
            assert isinstance(fed.result, trimig.Summary), f"cut at {cut}: {fed.result!r}"
            assert fed.answers == OPENED + PREPARED + ACCEPTED
            assert fed.guest.running
        if cut % 50 == 0 and cut <= prepared:
            fed.answers = b""
            await fed.feed(whole)
            assert isinstance(fed.result, trimig.Summary)
            assert fed.guest.running


async def test_peer_that_stalls(autojump_clock: trio.testing.MockClock) -> None:
    """T3: after stall_timeout the peer counts as gone."""
    fed = await Fed(stall_timeout=8.0).feed(
        stream(device=b"", state=b"", prepare=b"", decision=b"", text=b""), end=False
    )
    fed.refused(trimig.TransportFailed, "sent nothing for 8 s")
    assert 8 <= trio.current_time() < 9


async def test_description_that_does_not_come(autojump_clock: trio.testing.MockClock) -> None:
    """T1: the decision has come; the text about it is not worth the guest."""
    fed = await Fed().feed(stream(text=b""), end=False)
    assert isinstance(fed.result, trimig.Summary)
    assert "did not come" in fed.result.warnings[0]
    assert fed.answers == OPENED + PREPARED + ACCEPTED
    assert trio.current_time() < 5


async def test_source_that_is_gone_when_the_guest_has_arrived(autojump_clock: trio.testing.MockClock) -> None:
    """T1: the guest stays, and the summary says that the source could not be told."""
    link = VirtualLink()
    guest = waiting(pages=2, delays={"activate": 1})
    async with trio.open_nursery() as nursery:

        async def source() -> None:
            await link.a.send_all(stream())
            await trio.sleep(0.5)
            await link.a.aclose()

        nursery.start_soon(source)
        summary = await trimig.receive(guest, link.b)
    assert guest.running
    assert not summary.confirmed
    assert "could not be told" in summary.warnings[0]


async def test_pings_are_answered_with_their_values(autojump_clock: trio.testing.MockClock) -> None:
    """K6."""
    values = (0, 7, 2**32 - 1)
    pings = b"".join(wire.ping(value) for value in values)
    fed = await Fed().feed(stream(opened=wire.command(1) + pings))
    assert fed.answers == b"".join(encode(Pong(value=v)) for v in values) + PREPARED + ACCEPTED


async def test_guest_that_runs_cannot_be_filled(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing of a guest that runs may be overwritten by a stream."""
    guest = running(pages=2)
    before = guest.digest()
    fed = await Fed(guest).feed(stream())
    assert isinstance(fed.result, trimig.StateError)
    assert "runs here" in str(fed.result)
    assert fed.answers == b""
    assert fed.monitor.status is Status.NONE
    assert guest.digest() == before
    assert not guest.misuse


async def test_times_of_an_arrival_count_from_the_connection_on(autojump_clock: trio.testing.MockClock) -> None:
    """The time in which no source was there is not a part of the total time, nor of the rate."""
    async with destination(trimig.Config()) as there:
        await trio.sleep(100)
        began = trio.current_time()
        said = parts(list=ram_list(("ram", PAGES * 4096)), end=ram_end(zeros(*range(PAGES))))
        text = said.pop("text")
        peer = there.connect(b"".join(said.values())[:-1])
        await trio.sleep(3)
        await peer.say(wire.end_of_stream() + text)
        await peer.hear()
        took = trio.current_time() - began
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.outcome.waiting_time == pytest.approx(100, abs=1)
    assert there.outcome.setup_time == 0
    assert 2 < there.outcome.total_time < took + 0.001
    assert there.outcome.throughput == PAGES * 4096 / there.outcome.total_time
