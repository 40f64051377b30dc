"""multifd at a source, whose destination is played: what goes where, what is counted, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import uuid
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.data_channels import Compression, Lane, Played, config, data_packets, guest
from trimig.config.peer import PEERS
from trimig.engine.device_writer import UUID_SUBSECTION, machine_uuid
from trimig.engine.ram.multifd_sender import Manner, Zeros
from trimig.engine.sections.ram import beside_of
from trimig.engine.source import migrate_stream
from trimig.errors import ConfigError, Ownership, TransportFailed
from trimig.guest import PAGE_SIZE, ConfigSubsection
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, Fault, FaultKind, ScriptedGuest, VirtualLink, virtual_link
from trimig.wire.pages.multifd import HEADER_BYTES, HELLO_BYTES, PACKET_PAGES, Packet

SCHEMES = pytest.mark.parametrize("profile", ["qemu-7.2", "qemu-8.1", "qemu-11.1"])


async def migrated(
    settings: trimig.Config, source: ScriptedGuest, played: Played | None = None
) -> tuple[Played, MonitorCore, trimig.Summary]:
    """A migration that succeeds, with every page compared."""
    played = played or Played(settings, source)
    monitor = MonitorCore()
    summary = await played.run(lambda: migrate_stream(source, played.connections(), settings, monitor))
    for block in source.ram:
        assert np.array_equal(played.memory[block.name], block.pages), block.name
    assert monitor.status is Status.COMPLETED
    assert not source.tracking
    assert not source.claimed
    return played, monitor, summary


async def failed(settings: trimig.Config, source: ScriptedGuest, played: Played) -> trimig.TrimigError:
    """A migration that fails, and leaves the guest where it was."""
    monitor = MonitorCore()
    with pytest.raises(trimig.TrimigError) as caught:
        await played.run(lambda: migrate_stream(source, played.connections(), settings, monitor))
    assert caught.value.owner is Ownership.SOURCE
    assert source.running
    assert not source.tracking
    assert not source.claimed
    assert all(link.a.closed for link in [played.main, *played.links])
    return caught.value


# -- what goes where ---------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("zeros", ["legacy", "multifd", "none"])
async def test_every_page_arrives(
    autojump_clock: trio.testing.MockClock, profile: str, compression: Compression, zeros: str
) -> None:
    """S13: several passes of a guest that writes; each block in packets of its own."""
    settings = config(channels=3, profile=profile, compression=compression, zeros=zeros, downtime_limit=0)
    settings = dataclasses.replace(settings, max_iterations=4, on_bound="switchover")
    source = guest(dirty_per_sync=40)
    played, monitor, summary = await migrated(settings, source)
    packets = [packet for lane in played.lanes for packet in lane.packets]
    assert sorted(lane.hello.number for lane in played.lanes if lane.hello is not None) == [0, 1, 2]
    assert played.page_records == 0, "a page of precopy on the main connection"
    named = any(len(packet.zeros) for packet in packets)
    assert named is (zeros == "multifd" and profile == "qemu-11.1")
    assert (played.zero_records > 0) is (zeros == "legacy" or (zeros == "multifd" and profile != "qemu-11.1"))
    assert all(len(packet.offsets) + len(packet.zeros) <= PACKET_PAGES for packet in packets)
    assert summary.iterations > 1
    if zeros == "none":
        assert summary.zero_pages == 0
    assert summary.normal_pages == sum(len(packet.offsets) for packet in packets)
    assert monitor.info()["ram"]["normal"] == summary.normal_pages


async def test_the_old_scheme_synchronises_at_each_section(autojump_clock: trio.testing.MockClock) -> None:
    """START, each PART and END; a packet of its own on each channel, in the numbers' order."""
    played, _, _ = await migrated(config(), guest())
    sections = [name for name in played.order if name in ("RamEnd", "sync")]
    assert sections == ["sync", "RamEnd"] * 3
    for lane in played.lanes:
        assert [packet.sync for packet in lane.packets if not data_packets(lane) or packet.sync] == [True] * 3
        numbers = [packet.number for packet in lane.packets]
        assert numbers == sorted(set(numbers))
    numbers = sorted(packet.number for lane in played.lanes for packet in lane.packets)
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("profile", ["qemu-8.1", "qemu-11.1"])
async def test_the_new_schemes_synchronise_once_a_pass(autojump_clock: trio.testing.MockClock, profile: str) -> None:
    """newer.md part 3.3: the word on the main connection stands in START, behind the pass, and in END."""
    played, _, _ = await migrated(config(profile=profile), guest())
    assert played.order.count("sync") == 3
    assert [lane.released for lane in played.lanes] == [3, 3]


async def test_the_channels_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    """A large block is divided among them, in whole packets."""
    source = guest(pages=4000)
    played, _, _ = await migrated(config(channels=4), source)
    counts = [len(data_packets(lane)) for lane in played.lanes]
    assert min(counts) >= 4
    sizes = [len(packet.offsets) for lane in played.lanes for packet in data_packets(lane)]
    assert sizes.count(PACKET_PAGES) >= len(sizes) - 6


async def test_a_channel_that_takes_nothing_does_not_hold_up_the_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The next job goes to the next channel that has nothing to do."""
    settings, source = config(channels=2), guest(pages=8000)
    played = Played(settings, source, link=lambda: VirtualLink(window=1 << 16, latency=0.001))

    def see(lane: Lane, packet: Packet) -> None:
        if lane is played.lanes[0] and len(lane.packets) == 3:
            played.links[0].inject("stall", seconds=20.0)

    played.see = see
    await migrated(settings, source, played)
    first, second = (len(data_packets(lane)) for lane in played.lanes)
    assert second > 3 * first


# -- what is counted ---------------------------------------------------------------------------------------------------


@SCHEMES
async def test_what_is_counted(autojump_clock: trio.testing.MockClock, profile: str) -> None:
    """G4: all bytes of the data channels are multifd-bytes; the main connection has the others."""
    played, monitor, summary = await migrated(config(profile=profile), guest())
    ram = monitor.info()["ram"]
    assert ram["multifd-bytes"] == sum(lane.received for lane in played.lanes)
    assert summary.bytes_transferred == ram["transferred"] == ram["multifd-bytes"] + played.main.sent("a->b")
    assert ram["precopy-bytes"] + ram["downtime-bytes"] == played.main.sent("a->b")
    assert ram["normal"] + ram["duplicate"] == 605
    assert ram["remaining"] == 0


async def test_the_limit_is_that_of_all_channels_together(autojump_clock: trio.testing.MockClock) -> None:
    """Bytes as they are on the wire, within one window of the limiter."""
    source = guest(pages=3000)
    settings = config(channels=3, max_bandwidth=1 << 20, downtime_limit=1)
    began = trio.current_time()
    played, _, _ = await migrated(settings, source)
    seconds = trio.current_time() - began
    sent = sum(lane.received for lane in played.lanes) + played.main.sent("a->b")
    assert 0.9 < sent / (1 << 20) / seconds <= 1.05


def test_levels_and_manners() -> None:
    """The profile decides the scheme, and the parameters where zero pages go and how pages are compressed."""
    settings = config(profile="qemu-9.0", compression="zstd", multifd_zstd_level=7, multifd_zlib_level=3)
    assert Manner.of(settings) == Manner(
        channels=2, each_section=False, new_packets=True, zeros=Zeros.PACKETS, compression="zstd", level=7
    )
    settings = config(channels=5, profile="qemu-8.0", compression="zlib", zeros="none", multifd_zlib_level=3)
    assert Manner.of(settings) == Manner(
        channels=5, each_section=True, new_packets=False, zeros=Zeros.CONTENT, compression="zlib", level=3
    )


# -- how it ends -------------------------------------------------------------------------------------------------------


async def test_a_channel_that_cannot_be_opened(autojump_clock: trio.testing.MockClock) -> None:
    """L16, U3: the cause, and what to do; nothing is left of the others."""
    settings, source = config(channels=3), guest()
    played = Played(settings, source)

    def refuse(number: int) -> None:
        if number == 1:
            raise TransportFailed("connection refused")

    played.refuse = refuse
    error = await failed(settings, source, played)
    assert isinstance(error, TransportFailed)
    assert "of multifd could not be opened: connection refused; multifd must be on at the destination too" in str(error)


@pytest.mark.parametrize("after", [0, HELLO_BYTES - 1, HELLO_BYTES, HELLO_BYTES + HEADER_BYTES, 300_000])
@pytest.mark.parametrize("kind", ["eof", "reset"])
async def test_a_channel_that_breaks_ends_the_attempt(
    autojump_clock: trio.testing.MockClock, after: int, kind: FaultKind
) -> None:
    """T1: within seconds, in one sentence; the guest runs, and every connection is closed."""
    made = 0

    def link() -> VirtualLink:
        nonlocal made
        made += 1
        faults = [Fault(direction="a->b", after=after, kind=kind)] if made == 3 else []
        return VirtualLink(latency=0.001, faults=faults)

    settings, source = config(channels=3), guest(pages=2000)
    played = Played(settings, source, link=link)
    began = trio.current_time()
    error = await failed(settings, source, played)
    assert "data channel" in str(error)
    assert "of multifd" in str(error)
    assert trio.current_time() - began < 5


async def test_bytes_on_a_data_channel_are_refused(autojump_clock: trio.testing.MockClock) -> None:
    """The destination has nothing to say there."""
    settings, source = config(max_bandwidth=1 << 20), guest(pages=2000)
    played = Played(settings, source)
    said = False

    async def say() -> None:
        await played.lanes[0].stream.send_all(b"hello")

    def see(lane: Lane, packet: Packet) -> None:
        nonlocal said
        if not said:
            said = True
            assert played._nursery is not None
            played._nursery.start_soon(say)

    played.see = see
    error = await failed(settings, source, played)
    assert "the destination has sent bytes on data channel" in str(error)


@pytest.mark.parametrize("pages", [4, 2000])
async def test_a_destination_of_another_scheme(autojump_clock: trio.testing.MockClock, pages: int) -> None:
    """newer.md part 3.3: it would run a small guest without its memory; nothing was sent on a data channel."""
    source = guest(pages=pages)
    played = Played(config(profile="qemu-11.1"), source)
    error = await failed(config(profile="qemu-7.2"), source, played)
    assert isinstance(error, ConfigError)
    assert "choose another peer profile than 'qemu-7.2'" in str(error)
    assert [lane.packets for lane in played.lanes] == [[], []]


@pytest.mark.parametrize("profile", ["qemu-7.2", "qemu-11.1"])
async def test_cancelled_half_way_nothing_is_left(autojump_clock: trio.testing.MockClock, profile: str) -> None:
    """A.1 row 24: the guest runs, and the next attempt succeeds."""
    settings, source = config(profile=profile), guest(pages=2000)
    played = Played(settings, source, link=lambda: VirtualLink(window=1 << 16, latency=0.001))
    monitor = MonitorCore()

    def see(lane: Lane, packet: Packet) -> None:
        if len(lane.packets) == 4:
            monitor.cancel("the test")

    played.see = see
    with pytest.raises(trimig.MigrationCancelled):
        await played.run(lambda: migrate_stream(source, played.connections(), settings, monitor))
    assert source.running
    assert all(link.a.closed for link in [played.main, *played.links])
    await migrated(settings, source)


async def test_the_seeds_multifd_makes_no_connection(autojump_clock: trio.testing.MockClock) -> None:
    """B19, B20: nothing changes on the wire, and with the main connection all connections are there."""
    settings, source = config(profile="qemu-2.11"), guest()
    assert beside_of(settings) == ()
    played, monitor, summary = await migrated(settings, source)
    assert played.lanes == []
    assert played.page_records == summary.normal_pages > 0
    assert (summary.data_channels, monitor.info()["ram"]["multifd-bytes"]) == (0, 0)


async def test_without_multifd_zero_pages_may_go_as_others(autojump_clock: trio.testing.MockClock) -> None:
    """Q6: zero-page-detection none looks for none; with legacy they are short records."""
    base = config(zeros="none")
    settings = dataclasses.replace(base, capabilities=trimig.Capabilities())
    played, _, summary = await migrated(settings, guest())
    assert (summary.normal_pages, summary.zero_pages) == (605, 0)
    assert (played.page_records, played.zero_records) == (605, 0)


# -- postcopy ----------------------------------------------------------------------------------------------------------


async def test_with_postcopy_a_destination_that_may_be_old_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """multifd.md part 7: it would abort at the end, and the guest would be lost; nothing was sent yet."""
    settings, source = config(postcopy=True), guest()
    played = Played(settings, source)
    error = await failed(settings, source, played)
    assert isinstance(error, ConfigError)
    assert error.name == "multifd"
    assert "loses the guest in a QEMU before 11.1" in str(error)
    assert not any(data_packets(lane) for lane in played.lanes)


@pytest.mark.parametrize(("profile", "mark"), [("qemu-7.2", True), ("qemu-11.1", False)])
async def test_in_postcopy_pages_go_on_the_main_connection(
    autojump_clock: trio.testing.MockClock, profile: str, *, mark: bool
) -> None:
    """newer.md part 3.5: the data channels have the pages of precopy, and are synchronised before the switch."""
    settings = config(profile=profile, postcopy=True, max_bandwidth=1 << 20, downtime_limit=1)
    source = guest(pages=2000)
    played = Played(settings, source, mark=mark)
    monitor = MonitorCore()
    sent = 0

    def see(lane: Lane, packet: Packet) -> None:
        nonlocal sent
        sent += len(packet.offsets)
        if sent > 500:
            monitor.start_postcopy()

    played.see = see
    summary = await played.run(lambda: migrate_stream(source, played.connections(), settings, monitor))
    assert summary.confirmed
    for block in source.ram:
        assert np.array_equal(played.memory[block.name], block.pages)
    assert played.page_records > 500
    at = played.order.index("PackageElement")
    assert "sync" in played.order[:at]
    assert "sync" not in played.order[at:]
    assert monitor.info()["ram"]["postcopy-bytes"] > 500 * PAGE_SIZE


# -- the rules around it -----------------------------------------------------------------------------------------------


async def test_other_transports_are_refused_by_name(tmp_path: Path) -> None:
    """Before anything is opened; the guest was not touched."""
    source = ScriptedGuest(blocks={"ram": 4}, devices=[FakeDevice("clock", size=8)])
    ours, theirs = virtual_link()
    for to in (ours, f"file:{tmp_path}/f", "exec:cat"):
        with pytest.raises(ConfigError, match="multifd needs several connections") as caught:
            await trimig.migrate(source, to, config())
        assert caught.value.owner is Ownership.SOURCE
        assert source.running
    assert await theirs.receive_some() == b""
    assert not os.listdir(tmp_path)


def test_the_uuid_is_that_of_the_stream_or_the_one_that_was_given() -> None:
    """The destination always compares it (multifd.md part 2)."""
    assert machine_uuid(guest()) == bytes(16)
    text = "00112233-4455-6677-8899-aabbccddeeff"
    app = trimig.AppGuest("none")
    app.uuid = text
    assert machine_uuid(app) == uuid.UUID(text).bytes
    with trimig.ParkedGuest() as parked:
        assert machine_uuid(parked) == bytes(16)
        parked.uuid = text
        assert machine_uuid(parked) == uuid.UUID(text).bytes
        named = ConfigSubsection(name=UUID_SUBSECTION, version=1, payload=bytes(range(16)))
        parked.adopt("pc", [named], [("ram", PAGE_SIZE)])
        assert machine_uuid(parked) == bytes(range(16))


async def test_the_hello_has_the_uuid(autojump_clock: trio.testing.MockClock) -> None:
    source = guest()
    played, _, _ = await migrated(config(), source)
    assert [lane.hello.uuid for lane in played.lanes if lane.hello is not None] == [bytes(16)] * 2


def test_the_profiles() -> None:
    """Only 11.1 can do both; a guest of trimig's own has the oldest scheme, which every trimig reads."""
    assert [name for name, profile in PEERS.items() if profile.multifd_postcopy] == ["qemu-11.1"]
