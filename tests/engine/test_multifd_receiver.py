"""multifd at the destination: data channels beside the main connection, from a source that is played byte by byte."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.multifd_source import (
    CHANNELS,
    CLOSE,
    FLAGS,
    HEAD,
    LIST,
    PAGES,
    Packets,
    There,
    config,
    content,
    destination,
    end,
    guest,
    lazy,
    part,
    played,
    start,
    zeros,
)
from tests.engine.test_postcopy_bad_input import PACKAGE
from trimig.config.peer import PEERS
from trimig.errors import Ownership
from trimig.guest import PAGE_SIZE, ConfigSubsection
from trimig.status import Status
from trimig.testing import ScriptedGuest
from trimig.wire import Command, RecordWriter, Section
from trimig.wire import encoder as wire
from trimig.wire import postcopy as pc
from trimig.wire.pages.multifd import Hello, Packet, PacketFlag, write_hello, write_packet
from trimig.wire.return_path import Pong, ResumeAck, Shut

UUID = "00112233-4455-6677-8899-aabbccddeeff"
RAW_UUID = bytes.fromhex(UUID.replace("-", ""))


class Named(ScriptedGuest):
    """A machine with a UUID."""

    uuid = UUID


def packets(*, new: bool = True, compression: str = "none", uuid: bytes = bytes(16)) -> list[Packets]:
    return [Packets(number, new=new, compression=compression, uuid=uuid) for number in range(CHANNELS)]


def bare(*, new: bool = True) -> list[bytes]:
    """What each channel says in a migration of zero pages only: START, a PART and END."""
    return [each.hello + 3 * each.sync for each in packets(new=new)]


def main(*, new: bool = True) -> bytes:
    """The main connection of such a migration."""
    return HEAD + start(new=new) + part(zeros(*range(PAGES)), new=new) + end(new=new)


def error_of(there: There) -> trimig.TrimigError:
    """Why it has failed; the source was told so and keeps its guest."""
    assert isinstance(there.outcome, trimig.TrimigError), there.outcome
    assert there.outcome.owner is Ownership.SOURCE
    assert Shut(status=1) in there.heard
    return there.outcome


# -- what is right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", list(FLAGS))
@pytest.mark.parametrize("new", [False, True], ids=["7.2", "9.0"])
async def test_pages_come_on_three_channels_in_several_passes(
    autojump_clock: trio.testing.MockClock, *, new: bool, compression: str
) -> None:
    """S13: a page that comes again on another channel is the one of the later pass; B20: main and three connections."""
    one, two, three = packets(new=new, compression=compression)
    data = [
        one.hello + one.sync + one.pages(5, 3, 4, fill=1) + one.sync + one.pages(0, fill=6) + one.sync + one.sync,
        two.hello + two.sync + two.pages(1, 2, fill=2) + two.sync + two.sync + two.pages(5, 11, fill=7) + two.sync,
        three.hello + three.sync,
    ]
    if new:  # zero pages in packets, with pages and without
        data[2] += three.pages(6, fill=3, zero=(7, 8)) + three.sync + three.pages(fill=0, zero=(3, 9)) + three.sync
        records = zeros(10)
    else:  # a packet that has pages synchronises, and an empty one follows
        data[2] += three.pages(6, fill=3, sync=True) + write_packet(Packet(number=6), new=False) + three.sync
        records = zeros(7, 8, 9, 10)
    data[2] += three.sync
    second = b"" if new else zeros(3)
    stream = HEAD + start(new=new) + part(records, new=new) + part(second, new=new) + end(new=new)
    there = await played(stream, data, config(multifd_compression=compression))
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.pages() == [6, 2, 2, 0, 1, 7, 3, 0, 0, 0, 0, 7]
    assert bytes(there.guest.ram[0].pages[11]) == content(7)
    size = sum(map(len, data))
    assert (there.outcome.data_channels, there.outcome.multifd_bytes) == (CHANNELS, size)
    assert there.monitor.info()["multifd-bytes"] == size
    assert all(link.b.closed for link in there.links)


@pytest.mark.parametrize("first", [(0,), (2, 0, 1)], ids=["one", "all"])
async def test_channels_that_come_before_the_main_connection(
    autojump_clock: trio.testing.MockClock, first: tuple[int, ...]
) -> None:
    there = await played(main(), bare(), first=first)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.pages() == PAGES * [0]


@pytest.mark.parametrize("hold", [True, False])
async def test_channels_may_end_behind_the_last_synchronisation(
    autojump_clock: trio.testing.MockClock, *, hold: bool
) -> None:
    there = await played(main(), bare(), hold=hold)
    assert isinstance(there.outcome, trimig.Summary), there.outcome


async def test_a_stream_of_8_1_has_marks_and_zero_pages_on_the_main_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """newer.md part 3.3; the mark may stand anywhere in a PART, and its end means nothing."""
    one, two, three = packets()
    data = [each.hello + each.sync + each.pages(number, fill=number + 1) + 2 * each.sync for number, each in
            enumerate((one, two, three))]  # fmt: skip
    records = zeros(3) + wire.SYNC_WORD + zeros(*range(4, PAGES))
    stream = HEAD + start(new=True) + wire.section_continue(Section.PART, 2) + records + wire.END_WORD
    stream += wire.section_footer(2) + wire.section_continue(Section.PART, 2) + wire.END_WORD + wire.section_footer(2)
    peer = dataclasses.replace(trimig.PeerProfile(), multifd_scheme="8.1")
    there = await played(stream + end(new=True), data, config(peer=peer))
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.pages() == [1, 2, 3] + 9 * [0]


async def test_the_uuid_is_that_of_the_stream(autojump_clock: trio.testing.MockClock) -> None:
    target = guest(Named)
    there = await played(main(), [each.hello + 3 * each.sync for each in packets(uuid=RAW_UUID)], target=target)
    assert isinstance(there.outcome, trimig.Summary), there.outcome


async def test_a_footer_that_comes_late_holds_nothing_up(autojump_clock: trio.testing.MockClock) -> None:
    """A QEMU may keep the footer of START in its buffer until it has sent pages on the data channels."""
    one, two, three = packets(new=False)
    async with destination() as there:
        peer = there.connect(HEAD + LIST + wire.END_WORD)
        channels = [there.connect(each.hello + each.sync) for each in (one, two, three)]
        await trio.sleep(1)
        await channels[0].say(one.pages(*range(PAGES), fill=4))
        await trio.sleep(1)
        assert there.monitor.counters.normal == PAGES
        for each, packet in zip(channels, (one, two, three), strict=True):
            await each.say(2 * packet.sync)
        await peer.say(wire.section_footer(2) + part(new=False) + end(new=False))
        await peer.hear()
    assert isinstance(there.outcome, trimig.Summary), there.outcome


async def test_the_seed_has_one_connection_with_the_capability_on(autojump_clock: trio.testing.MockClock) -> None:
    """B19: all pages come on the main connection, and nothing else is waited for."""
    seed = config(peer=dataclasses.replace(PEERS["qemu-2.11"], suppress_vmdesc=True))
    page = wire.section_continue(Section.PART, 2) + records(*range(PAGES), fill=3) + CLOSE
    there = await played(HEAD + start(new=False) + page + end(new=False), [], seed)
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.pages() == PAGES * [3]
    assert len(there.links) == 1
    assert "multifd-bytes" not in there.monitor.info()


# -- with postcopy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("new", [False, True], ids=["7.2", "11.1"])
async def test_pages_of_postcopy_follow_on_the_main_connection(
    autojump_clock: trio.testing.MockClock, *, new: bool, preempt: bool
) -> None:
    """newer.md part 3.5: what the data channels bring behind the switch means nothing, and they stay open."""
    each = packets(new=new)
    target = lazy()
    settings = config(postcopy_ram=True, postcopy_preempt=preempt, peer=profile(new))
    async with destination(settings, target) as there:
        peer = there.connect(HEAD + pc.advise(pc.Advice()) + start(new=new))
        channels = [
            there.connect(one.hello + one.sync + one.pages(n, fill=n + 1) + one.sync) for n, one in enumerate(each)
        ]
        beside = there.connect() if preempt else None
        await peer.say(part(zeros(3), new=new) + stale(1) + PACKAGE)
        await peer.hear_until(Pong(value=3))
        for channel, one in zip(channels, each, strict=True):
            await channel.say(one.pages(1, fill=9) + 100 * one.sync)
        if beside is not None:
            await beside.say(records(4, fill=8) + wire.END_WORD)
        rest = [page for page in (1, *range(4, PAGES)) if beside is None or page != 4]
        await peer.say(wire.section_continue(Section.PART, 2) + records(*rest, fill=8) + wire.END_WORD)
        await peer.say(wire.section_footer(2) + wire.section_continue(Section.END, 2) + wire.END_WORD)
        await peer.say(wire.section_footer(2) + wire.end_of_stream())
        await peer.hear_until(Shut(status=0))
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert there.pages() == [1, 8, 3, 0] + 8 * [8]
    assert not target.overwritten


def profile(new: bool) -> trimig.PeerProfile:
    return dataclasses.replace(trimig.PeerProfile(), preempt_pre_7_2=not new, suppress_vmdesc=True)


def stale(page: int) -> bytes:
    bitmap = np.zeros(PAGES, np.bool_)
    bitmap[page] = True
    return b"".join(pc.discards("ram", bitmap))


def records(*pages: int, fill: int) -> bytes:
    data = np.full((len(pages), PAGE_SIZE), fill, np.uint8)
    return RecordWriter().page_records("ram", np.array(pages, np.int64) * PAGE_SIZE, data)


async def test_a_recovery_needs_no_data_channels(autojump_clock: trio.testing.MockClock) -> None:
    """All connections are lost, and a new main one brings the rest."""
    each = packets()
    async with destination(config(postcopy_ram=True, peer=profile(True)), lazy()) as there:
        peer = there.connect(HEAD + pc.advise(pc.Advice()) + start(new=True))
        channels = [
            there.connect(one.hello + one.sync + one.pages(n, fill=n + 1) + one.sync) for n, one in enumerate(each)
        ]
        await peer.say(part(new=True) + PACKAGE)
        await peer.hear_until(Pong(value=3))
        await there.monitor.wait_status(Status.POSTCOPY_ACTIVE)
        for one in (peer, *channels):
            await one.stream.aclose()
        await there.monitor.wait_status(Status.POSTCOPY_PAUSED)
        there.monitor.recover("again")
        again = there.connect()
        again.decoder.expect_bitmap("ram")
        await again.say(wire.command(Command.RECV_BITMAP, b"\x03ram") + wire.command(Command.POSTCOPY_RESUME))
        await again.hear_until(ResumeAck())
        await again.say(wire.section_continue(Section.PART, 2) + records(*range(3, PAGES), fill=8) + wire.END_WORD)
        await again.say(wire.section_footer(2) + wire.section_continue(Section.END, 2) + wire.END_WORD)
        await again.say(wire.section_footer(2) + wire.end_of_stream())
        await again.hear_until(Shut(status=0))
    assert isinstance(there.outcome, trimig.Summary), there.outcome


# -- channels that are not as they should be ---------------------------------------------------------------------------


async def test_multifd_at_the_destination_only(autojump_clock: trio.testing.MockClock) -> None:
    """A page on the main connection shows it at once, and without one it is found out within seconds; L16."""
    page = HEAD + start(new=False) + wire.section_continue(Section.PART, 2) + records(1, fill=3)
    error = error_of(await played(page, []))
    assert isinstance(error, trimig.RemoteProtocolError)
    assert "the capability multifd is on here and off at the source" in str(error)
    began = trio.current_time()
    error = error_of(await played(main(new=False), []))
    assert "no data channel has come for 5 s: the capability multifd is on here, and it may be off" in str(error)
    assert trio.current_time() - began < 7


@pytest.mark.parametrize("lacking", range(CHANNELS))
async def test_a_channel_that_never_comes(autojump_clock: trio.testing.MockClock, lacking: int) -> None:
    """U3: the channels that have come do not hide it."""
    data = bare()
    del data[lacking]
    error = error_of(await played(main(), data))
    assert isinstance(error, trimig.TransportFailed)
    assert f"2 of 3 data channels have come, and no further one for 5 s (these are missing: {lacking})" in str(error)
    assert "set multifd-channels to the same number at both sides" in str(error)


@pytest.mark.parametrize("first", [(), (0, 1, 2, 3)], ids=["main first", "main last"])
@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (write_hello(Hello(uuid=bytes(16), number=1)), "data channel 1 is there already"),
        (write_hello(Hello(uuid=bytes(16), number=3)), "has the number 3, and multifd-channels is 3 here"),
        (write_hello(Hello(uuid=RAW_UUID, number=2)), f"of the machine with the UUID {UUID}, this one has no UUID"),
        (bytes.fromhex("1122334400000002") + bytes(56), "version 2, 1 is needed"),
        (bytes.fromhex("1122334500000001") + bytes(56), "has its source already|not a migration stream"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP request"),
    ],
    ids=["twice", "too large", "other machine", "version", "magic", "HTTP"],
)
async def test_a_stranger_among_the_channels_is_dropped(
    autojump_clock: trio.testing.MockClock, first: tuple[int, ...], hello: bytes, words: str
) -> None:
    """The migration goes on: each stands in front of the right channel 2."""
    data = bare()
    target = guest()
    told: list[str] = []
    async with destination(target=target) as there:
        there.monitor.add_listener(lambda event: told.append(event.data.get("reason", "")))
        order = [data[0], data[1], hello + 50 * b"x"]
        for one in order if first else []:
            there.connect(one)
        peer = there.connect(main())
        for one in [] if first else order:
            there.connect(one)
            await trio.sleep(1)
        await trio.sleep(1)
        there.connect(data[2])
        await peer.hear()
    assert isinstance(there.outcome, trimig.Summary), there.outcome
    assert re.search(words, " ".join(told)), told


async def test_a_source_with_more_channels_is_told_why(autojump_clock: trio.testing.MockClock) -> None:
    """Its channel is closed, so it fails."""
    data = [*bare(), write_hello(Hello(uuid=bytes(16), number=3)) + packets()[0].sync]
    told: list[str] = []
    async with destination() as there:
        there.monitor.add_listener(lambda event: told.append(event.data.get("reason", "")))
        for one in data:
            there.connect(one)
        peer = there.connect(HEAD + start(new=True))
        await trio.sleep(1)
        await peer.end()
        await peer.hear()
        there.heard = peer.heard
    error_of(there)
    assert "has the number 3, and multifd-channels is 3 here: set it to the same number at both sides" in " ".join(told)


async def test_another_machine_than_that_of_the_stream(autojump_clock: trio.testing.MockClock) -> None:
    """The configuration section is read behind the hellos."""
    stream = wire.file_header() + wire.configuration(
        "scripted", [ConfigSubsection(name="configuration/uuid", version=1, payload=RAW_UUID)]
    )
    there = await played(stream + main()[len(wire.file_header() + wire.configuration("scripted", ())) :], bare())
    assert isinstance(there.outcome, trimig.TrimigError)
    assert f"the UUID {UUID}" in str(there.outcome)


# -- packets that are not as they should be ----------------------------------------------------------------------------


def channel(*data: bytes) -> bytes:
    """Channel 1, behind its first synchronisation."""
    one = Packets(1, new=True)
    return one.hello + one.sync + b"".join(data)


def raw(**fields: object) -> bytes:
    return write_packet(Packet(number=0, **fields), new=True)  # type: ignore[arg-type]  # handed on as they are


def at(*offsets: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(offsets, np.int64)


BASE = 64 + 1344


@pytest.mark.parametrize(
    ("data", "words", "offset"),
    [
        (channel(b"QEVM" + bytes(1340)), "magic 5145564d", BASE),
        (channel(bytes.fromhex("1122334400000002") + bytes(1336)), "version 2", BASE + 4),
        (channel(bytes.fromhex("112233440000000100000080") + bytes(1332)), "unknown flags 0x80", BASE + 8),
        (channel(raw(block="rom", offsets=at(0), size=PAGE_SIZE)), "unknown RAM block 'rom'", BASE + 64),
        (channel(raw(block="ram", offsets=at(1 << 40), size=PAGE_SIZE)), "outside of RAM block", BASE + 320),
        (channel(raw(block="ram", offsets=at(PAGES * PAGE_SIZE), size=PAGE_SIZE)), "outside of RAM block", BASE + 320),
        (channel(raw(block="ram", zeros=at(PAGES * PAGE_SIZE))), "outside of RAM block", BASE + 320),
        (channel(raw(block="ram", offsets=at(0), size=5)), "1 pages in 5 bytes, not compressed", BASE + 20),
        (channel(raw(block="ram", offsets=at(0), size=9, compression=PacketFlag.ZLIB)), "'zlib', .* 'none'", BASE + 8),
        (Packets(1, new=True).hello + Packets(1, new=True).pages(1, fill=1), "in front of the first synchron", BASE),
    ],
)
async def test_a_bad_packet_ends_the_attempt_with_its_place(
    autojump_clock: trio.testing.MockClock, data: bytes, words: str, offset: int
) -> None:
    """Gap G14, P8: a QEMU hangs here. The main reader waits for more, or for the synchronisation; the guest is not started."""
    for stream in (HEAD + start(new=True), main()):
        error = error_of(await played(stream, [bare()[0], data, bare()[2]]))
        assert isinstance(error, trimig.RemoteProtocolError), error
        with pytest.raises(trimig.RemoteProtocolError, match=rf"data channel 1: .*{words}"):
            raise error
        assert (error.offset, error.section) == (offset, "multifd")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("bomb", "has more than the 4096 bytes"),
        ("one byte more", "has more than the 4096 bytes"),
        ("one byte less", "has 4095 bytes, and the pages have 4096"),
        ("nothing", "has 0 bytes"),
        ("noise", "stream is damaged"),
        ("an end", "stream has ended"),
    ],
)
async def test_compressed_pages_of_another_size(
    autojump_clock: trio.testing.MockClock, compression: str, form: str, words: str
) -> None:
    """A packet of a few KiB may hold gigabytes: never more is made than the pages have."""
    each = packets(compression=compression)
    one = each[1]
    raw_bytes = {"bomb": 1 << 20, "one byte more": PAGE_SIZE + 1, "one byte less": PAGE_SIZE - 1}
    if form in raw_bytes:
        data = one.compress(bytes(raw_bytes[form]))
    elif form == "an end":
        data = one.finished(bytes(PAGE_SIZE))
    else:
        data = b"" if form == "nothing" else 30 * b"\xff"
    head = raw(block="ram", offsets=at(0), size=len(data), compression=FLAGS[compression])
    channels = [each[0].hello + each[0].sync, one.hello + one.sync + head + data, each[2].hello + each[2].sync]
    error = error_of(await played(HEAD + start(new=True), channels, config(multifd_compression=compression)))
    assert isinstance(error, trimig.RemoteProtocolError)
    with pytest.raises(trimig.RemoteProtocolError, match=f"data channel 1: .*{words}"):
        raise error
    assert error.offset == BASE + 1344


async def test_the_methods_must_be_the_same(autojump_clock: trio.testing.MockClock) -> None:
    each = packets(compression="zstd")
    data = [one.hello + one.sync + one.pages(n, fill=1) for n, one in enumerate(each)]
    error = error_of(await played(HEAD + start(new=True), data, config(multifd_compression="zlib")))
    assert "compressed with 'zstd', and multifd-compression is 'zlib' here: set it to the same at both sides" in str(
        error
    )


# -- channels and the main connection out of step ----------------------------------------------------------------------


async def test_pages_behind_the_last_synchronisation(autojump_clock: trio.testing.MockClock) -> None:
    """Whether they come behind the end of the RAM, or were there before it."""
    for late in (False, True):
        one = Packets(1, new=True)
        async with destination() as there:
            peer = there.connect(HEAD + start(new=True) + part(zeros(*range(PAGES)), new=True))
            channels = [there.connect(data) for data in bare()]
            await trio.sleep(1)
            if not late:
                await channels[1].say(one.pages(2, fill=3))
            mark = wire.SYNC_WORD + wire.END_WORD + wire.section_footer(2)
            await peer.say(wire.section_continue(Section.END, 2) + mark)
            await trio.sleep(1)
            if late:
                await channels[1].say(one.pages(2, fill=3))
            await peer.hear()
            there.heard = peer.heard
        assert "data channel 1: pages behind the last synchronisation" in str(error_of(there))


async def test_pages_behind_the_last_synchronisation_in_front_of_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """They would not be waited for."""
    one = Packets(1, new=True)
    async with destination() as there:
        peer = there.connect(HEAD + start(new=True) + part(zeros(*range(PAGES)), new=True))
        there.connect(bare()[0])
        there.connect(one.hello + 2 * one.sync + one.pages(2, fill=3))
        there.connect(bare()[2])
        await trio.sleep(1)
        await peer.say(wire.section_continue(Section.END, 2) + wire.END_WORD + wire.section_footer(2))
        await peer.hear()
        there.heard = peer.heard
    assert "data channel 1: pages behind the last synchronisation" in str(error_of(there))


@pytest.mark.parametrize("new", [False, True], ids=["7.2", "9.0"])
async def test_a_synchronisation_that_never_comes(autojump_clock: trio.testing.MockClock, *, new: bool) -> None:
    """Neither for a silent channel, nor for one that has ended."""
    one = Packets(1, new=new)
    data = [bare(new=new)[0], one.hello + one.sync, bare(new=new)[2]]
    error = error_of(await played(main(new=new), data))
    assert "the synchronisation of data channel 1 has not come for 20 s (byte" in str(error)
    error = error_of(await played(main(new=new), data, hold=False))
    assert f"data channel 1 has ended at byte {BASE}, and its synchronisation has not come (byte" in str(error)


async def test_both_ways_of_synchronising_at_once(autojump_clock: trio.testing.MockClock) -> None:
    data = [each.hello + 5 * each.sync for each in packets()]
    error = error_of(await played(HEAD + start(new=False) + part(new=True), data))
    assert "a synchronisation mark, in a stream whose first section had none" in str(error)


async def test_a_profile_that_the_source_does_not_follow(autojump_clock: trio.testing.MockClock) -> None:
    peer = dataclasses.replace(trimig.PeerProfile(), multifd_scheme="9.0", name="qemu-9.0")
    error = error_of(await played(main(new=False), bare(new=False), config(peer=peer)))
    assert "as by a machine type up to 8.0, and the peer profile here is 'qemu-9.0'" in str(error)


async def test_a_mark_without_the_capability(autojump_clock: trio.testing.MockClock) -> None:
    there = await played(main(), [], trimig.Config())
    assert "a synchronisation mark of multifd channels (capability multifd)" in str(error_of(there))


async def test_the_main_connection_says_why_before_a_channel_that_was_cut(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The connections of a source that fails end together."""
    one = Packets(1, new=True)
    async with destination() as there:
        peer = there.connect(HEAD + start(new=True))
        there.connect(bare()[0])
        there.connect(one.hello + one.sync + one.pages(3, fill=2)[:2000], ends=True)
        there.connect(bare()[2])
        await trio.sleep(0.5)
        await peer.say(b"\x7f")
        await peer.hear()
        there.heard = peer.heard
    assert "unknown section type" in str(error_of(there))


async def test_a_channel_that_is_cut_in_a_packet(autojump_clock: trio.testing.MockClock) -> None:
    one = Packets(1, new=True)
    cut = one.hello + one.sync + one.pages(3, fill=2)[:2000]
    error = error_of(await played(HEAD + start(new=True), [bare()[0], cut, bare()[2]], hold=False))
    assert isinstance(error, trimig.TransportFailed)
    assert f"data channel 1 ends at byte {BASE + 2000}, inside a packet" in str(error)


async def test_a_missing_page_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing is trusted: the channels are in step, and a page has not come."""
    stream = HEAD + start(new=True) + part(zeros(*range(1, PAGES)), new=True) + end(new=True)
    error = error_of(await played(stream, bare()))
    assert "1 pages of RAM block 'ram' were never received, the first at offset 0x0" in str(error)
