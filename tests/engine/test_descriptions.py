"""What follows the end of a stream: a description wherever a QEMU waits for one, and an end that is seen without one."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from typing import Any

import pytest
import trio

import trimig
from tests.engine.test_order import END, EOF
from tests.engine.test_postcopy_bad_input import ALL, HEAD, OPENING, PACKAGE, START, able, destination, devices, part
from tests.engine.test_postcopy_bad_input import END as ENDING
from trimig.channel import offload
from trimig.engine import device_tail
from trimig.errors import RemoteProtocolError
from trimig.testing import virtual_link
from trimig.wire import encoder as wire
from trimig.wire.devices import description
from trimig.wire.return_path import Shut


async def parked_by_postcopy() -> trimig.ParkedGuest:
    guest = trimig.ParkedGuest()
    async with destination(guest) as there:
        peer = await there.connect()
        await peer.say(OPENING + part(0, 1, 2) + PACKAGE)
        await peer.hear_that_it_lives()
        await peer.say(part(*ALL[3:]) + ENDING)
        await peer.hear_until(Shut)
    assert isinstance(there.outcome, trimig.Summary)
    assert guest.description is None
    return guest


async def sent(guest: trimig.ParkedGuest, config: trimig.Config) -> bytes:
    """The stream that it is sent as; the destination takes it when it has come to its end."""
    ours, theirs = virtual_link()
    read = bytearray()

    async def take() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await theirs.receive_some():
                read.extend(data)

    capabilities = dataclasses.replace(config.capabilities, return_path=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trimig.migrate(guest, ours, dataclasses.replace(config, capabilities=capabilities))
    return bytes(read)


async def test_a_guest_parked_by_postcopy_is_sent_with_a_description(autojump_clock: trio.testing.MockClock) -> None:
    """A QEMU reads one, unless its machine type has none; this one has no devices in it, since they are not known."""
    with await parked_by_postcopy() as guest:
        stream = await sent(guest, trimig.Config())
        at = stream.rindex(b"\x00\x06")
        text = description.parse(stream[at + 6 :])
        assert (text.page_size, list(text.devices)) == (4096, [])
        assert int.from_bytes(stream[at + 2 : at + 6]) == len(stream) - at - 6
    with await parked_by_postcopy() as guest:
        profile = dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=True)
        stream = await sent(guest, trimig.Config(peer=profile))
        assert stream.endswith(wire.section_footer(5) + wire.end_of_stream())


async def test_and_comes_whole_to_another_that_parks_it(autojump_clock: trio.testing.MockClock) -> None:
    """The devices that the empty description does not name are told apart by their footers, hop for hop."""
    with await parked_by_postcopy() as guest, trimig.ParkedGuest() as second, trimig.ParkedGuest() as third:
        for here, there in ((guest, second), (second, third)):
            ours, theirs = virtual_link()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trimig.receive, there, theirs)
                await trimig.migrate(here, ours)
        assert [s.payload for s in third.sections] == [s.payload for s in guest.sections]
        assert (third.ram[0].pages == 5).all()


UNDESCRIBED = HEAD + START + part(*ALL) + END + devices()


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "profile"])
@pytest.mark.parametrize("asks", [False, True], ids=["", "PING"])
async def test_an_end_without_a_description(autojump_clock: trio.testing.MockClock, *, known: bool, asks: bool) -> None:
    """The source waits for its answer and closes nothing; silence behind the end is the end."""
    profile = dataclasses.replace(able().peer, suppress_vmdesc=known)
    with trimig.ParkedGuest() as guest:
        async with destination(guest, dataclasses.replace(able(), peer=profile, stall_timeout=3600.0)) as there:
            peer = await there.connect()
            began = trio.current_time()
            await peer.say(UNDESCRIBED + (wire.ping(9) if asks else b"") + EOF)
            await peer.hear_until(Shut)
            assert Shut(status=0) in peer.heard
            assert trio.current_time() - began < 5.0
        assert isinstance(there.outcome, trimig.Summary)
        assert [s.idstr for s in guest.sections] == ["clock", "globalstate"]
        assert guest.run_state == "paused"


async def test_a_description_that_is_none_has_its_offset() -> None:
    with pytest.raises(trimig.RemoteProtocolError, match=r"not valid JSON.*at byte 77 \(0x4d\)") as caught:
        await device_tail.check_description(b"{", 77, trimig.Config())
    assert caught.value.offset == 77


async def test_silence_in_the_middle_is_no_end(autojump_clock: trio.testing.MockClock) -> None:
    """A source that stands still for longer between two devices, or inside one, goes on."""
    text = wire.description(description.build(4096, []))
    pieces = [UNDESCRIBED[: -len(devices())] + devices()[:20], devices()[20:50], devices()[50:], EOF + text]
    with trimig.ParkedGuest() as guest:
        async with destination(guest) as there:
            peer = await there.connect()
            for piece in pieces:
                await peer.say(piece)
                await trio.sleep(4.0)
            await peer.hear_until(Shut)
        assert isinstance(there.outcome, trimig.Summary)


async def test_an_end_that_cannot_be_told_apart_names_the_way_out(autojump_clock: trio.testing.MockClock) -> None:
    """Without footers nothing shows where a device ends; one sentence, in seconds, on both sides."""
    profile = dataclasses.replace(able().peer, send_section_footer=False)
    bare = (START + part(*ALL) + END + devices()).replace(wire.section_footer(2), b"")
    for number in (4, 5):
        bare = bare.replace(wire.section_footer(number), b"")
    with trimig.ParkedGuest() as guest:
        async with destination(guest, dataclasses.replace(able(), peer=profile, stall_timeout=3600.0)) as there:
            peer = await there.connect()
            began = trio.current_time()
            await peer.say(HEAD + bare + EOF)
            await peer.hear_until(Shut)
            assert Shut(status=1) in peer.heard
            assert trio.current_time() - began < 20.0
        assert isinstance(there.outcome, RemoteProtocolError)
        assert "suppress-vmdesc=off" in str(there.outcome)


async def test_a_cancel_does_not_wait_for_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in a thread, which looks between two objects whether it is still wanted."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def look() -> None:
        begun.set()
        go_on.wait()
        offload.check_cancelled()

    def parse(*arguments: Any, **options: Any) -> description.Description:
        found = description.parse(*arguments, **options)
        ended.set()
        return found

    monkeypatch.setattr(device_tail, "check_cancelled", look)
    monkeypatch.setattr(device_tail, "parse", parse)
    device = {"name": "d", "instance_id": 0, "fields": []}
    text = description.build(4096, [device] * (2 * device_tail.INLINE_BYTES // 40))
    assert len(text) > device_tail.INLINE_BYTES
    with trio.fail_after(60), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device_tail.check_description, text, 0, trimig.Config())
            while not begun.is_set():  # noqa: ASYNC110 - the event is a thread's
                await trio.sleep(0.001)
            scope.cancel()
            go_on.set()
    assert scope.cancelled_caught
    assert not ended.is_set()
