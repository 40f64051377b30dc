"""multifd between two trimigs, over real sockets: S13."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import trio

import trimig
from tests.transport.pki import Pki

SIZE = 24 << 20
PAGE = 4096


def machine(*, running: bool, fill: int = 0) -> trimig.AppGuest:
    guest = trimig.AppGuest("multifd", running=running)
    guest.add_ram("ram", SIZE)
    if fill:
        guest.ram[0].pages[:] = fill
    return guest


def settings(*, channels: int = 3, compression: str = "none", profile: str = "qemu-7.2") -> trimig.Config:
    text = f"[capabilities]\nmultifd = true\n[parameters]\nmax-bandwidth = 0\nmultifd-channels = {channels}\n"
    return trimig.Config.from_toml(f'{text}multifd-compression = "{compression}"\n[peer]\nprofile = "{profile}"')


async def moved(here: trimig.Config, there: trimig.Config, uri: str, *, fill: int = 0) -> trimig.Summary:
    """Migrate mixed memory while it changes; every byte is compared."""
    monitor, taken = trimig.Monitor(), trimig.Monitor()
    with trio.fail_after(60), machine(running=True) as source, machine(running=False, fill=fill) as target:
        pages = source.ram[0].pages
        pages[::2] = np.random.default_rng(1).integers(0, 256, (len(pages) // 2, PAGE), np.uint8)
        written = 0

        def write(event: trimig.Event) -> None:
            nonlocal written
            if event.name == "PASS" and written < 5:
                written += 1
                pages[written::97] = written

        monitor.add_listener(write)
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                await trimig.receive(target, uri, there, monitor=taken)

            nursery.start_soon(receive)
            while not taken.addresses:
                await taken.wait_changed()
            summary = await trimig.migrate(source, taken.addresses[0], here, monitor=monitor)
        assert np.array_equal(target.ram[0].pages, pages)
        assert target.run_state == "running"
        assert (
            taken.counters.multifd_bytes == monitor.counters.multifd_bytes
            or here.parameters.multifd_compression != "none"
        )
    return summary


@pytest.mark.parametrize("profile", ["qemu-7.2", "qemu-8.1", "qemu-11.1"])
@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
async def test_every_page_arrives(compression: str, profile: str) -> None:
    config = settings(compression=compression, profile=profile)
    assert (await moved(config, config, "tcp:127.0.0.1:0")).confirmed


@pytest.mark.parametrize("scheme", ["unix", "ws", "tls"])
async def test_over_other_transports(tmp_path: Path, scheme: str) -> None:
    uris = {"unix": f"unix:{tmp_path}/socket", "ws": "ws://127.0.0.1:0/x", "tls": "tcp:127.0.0.1:0"}
    here = there = settings(channels=4, profile="qemu-11.1")
    if scheme == "tls":
        pki = Pki(tmp_path)
        here = here.with_options(tls=pki.make("client"))
        there = there.with_options(tls=pki.make("server", "localhost", "127.0.0.1"))
    assert (await moved(here, there, uris[scheme], fill=7)).confirmed


async def test_255_channels() -> None:
    config = settings(channels=255)
    assert (await moved(config, config, "tcp:127.0.0.1:0")).confirmed


@pytest.mark.parametrize(("here", "there"), [(2, 3), (3, 2)], ids=["fewer here", "more here"])
async def test_another_number_of_channels_is_said_on_both_sides(here: int, there: int) -> None:
    """L16."""
    taken = trimig.Monitor()
    with trio.fail_after(60), machine(running=True) as source, machine(running=False) as target:
        source.ram[0].pages[:] = 5
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trimig.MigrationError, match="multifd-channels"):
                    await trimig.receive(target, "tcp:127.0.0.1:0", settings(channels=there), monitor=taken)

            nursery.start_soon(receive)
            while not taken.addresses:
                await taken.wait_changed()
            with pytest.raises(trimig.MigrationError, match="multifd"):
                await trimig.migrate(source, taken.addresses[0], settings(channels=here))
        assert source.run_state == "running"


@pytest.mark.parametrize("preempt", [False, True])
async def test_postcopy_between_two_trimigs(*, preempt: bool) -> None:
    """The pages of precopy come on the data channels, and what follows the guest on the main connection."""
    more = {"multifd": True, "postcopy-ram": True, "postcopy-preempt": preempt}
    on = [f"{name}={'on' if state else 'off'}" for name, state in more.items()]
    config = trimig.Config().with_options(
        on, ["max-bandwidth=30M", "downtime-limit=1", "max-postcopy-bandwidth=0", "multifd-channels=3"]
    )
    monitor, taken = trimig.Monitor(), trimig.Monitor()
    target = trimig.LazyAppGuest("multifd", running=False)
    target.add_ram("ram", SIZE)
    with trio.fail_after(60), machine(running=True) as source, target:
        pages = source.ram[0].pages
        pages[:] = np.random.default_rng(2).integers(0, 256, pages.shape, np.uint8)
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                await trimig.receive(target, "tcp:127.0.0.1:0", config, monitor=taken)

            async def switch() -> None:
                async for picture in monitor.watch(0.01):
                    if picture.normal_pages > 500:
                        break
                monitor.start_postcopy()

            nursery.start_soon(receive)
            nursery.start_soon(switch)
            while not taken.addresses:
                await taken.wait_changed()
            summary = await trimig.migrate(source, taken.addresses[0], config, monitor=monitor)
        assert summary.confirmed
        assert monitor.counters.switched_to_postcopy
        assert taken.counters.multifd_bytes > 500 * PAGE
        assert np.array_equal(target.ram[0].pages, pages)


@pytest.mark.parametrize("profile", ["qemu-7.2", "qemu-11.1"])
async def test_the_reason_of_a_cancelled_source_arrives(profile: str) -> None:
    """F10: also where the end of a section waits for data channels that have ended."""
    config, taken, monitor = settings(profile=profile), trimig.Monitor(), trimig.Monitor()
    config = dataclasses.replace(config, parameters=config.parameters.replace(max_bandwidth=4 << 20))
    with trio.fail_after(60), machine(running=True) as source, machine(running=False) as target:
        source.ram[0].pages[:] = 5
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(trimig.PeerFailed, match=r"the source ended the migration: .* of the test"):
                    await trimig.receive(target, "tcp:127.0.0.1:0", config, monitor=taken)

            async def cancel() -> None:
                async for picture in monitor.watch(0.01):
                    if picture.normal_pages > 200:
                        break
                monitor.cancel("it is the end of the test")

            nursery.start_soon(receive)
            while not taken.addresses:
                await taken.wait_changed()
            nursery.start_soon(cancel)
            with pytest.raises(trimig.MigrationCancelled):
                await trimig.migrate(source, taken.addresses[0], config, monitor=monitor)
        assert source.run_state == "running"
        assert monitor.statistics().data_channels == 3
