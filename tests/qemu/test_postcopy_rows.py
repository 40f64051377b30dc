"""The rows of QEMU's own matrix about postcopy that need more than two ends and a socket: TLS, and recovery that fails.

Rows 38 and 39 of qemu-tests.md A.1 use X.509, because Python's ssl has no PSK before 3.13. The double failures are those
of A.2. Rows 36, 37, 40 and 41 need the capability postcopy-preempt; they are in test_postcopy_preempt.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu, random_ram
from tests.qemu.test_postcopy import MiB, after_pages, config, in_postcopy, in_postcopy_there
from tests.qemu.test_tls import x509
from tests.transport.pki import ID, Pki
from trimig import Status

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB
TLS_LISTEN = "tcp:localhost:0"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def named(uri: str) -> str:
    """With the name that is in the certificates."""
    return uri.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize("recovery", [False, True], ids=["38 plain", "39 recovery"])
async def test_to_qemu_over_tls(pki: Pki, *, recovery: bool) -> None:
    tls = config(background=20 * MiB).with_options(tls=pki.make("client"))
    extra = x509(pki.make("server"), "server")
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer", extra=extra) as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            await vm.set_parameters({"tls-creds": ID})
            uri = named(await vm.incoming(TLS_LISTEN))
            monitor = trimig.Monitor()

            async def steer() -> None:
                await after_pages(monitor, 500)
                if recovery:
                    await in_postcopy(monitor, 0.2)
                    await cut_and_recover_to(vm, monitor, TLS_LISTEN)

            await peers.while_migrating(guest, uri, tls, monitor, steer)
            await vm.wait_migration_status("completed")
            assert np.array_equal(vm.ram, peers.memory(guest))


@pytest.mark.parametrize("recovery", [False, True], ids=["38 plain", "39 recovery"])
async def test_from_qemu_over_tls(pki: Pki, *, recovery: bool) -> None:
    extra = x509(pki.make("client"), "client")
    tls = config().with_options(tls=pki.make("server"))
    with trimig.ParkedGuest() as guest:
        async with (
            peers.arriving(guest, tls, uri=TLS_LISTEN) as arrival,
            Qemu.start("none", "16M", extra=extra) as vm,
        ):
            vm.ram[:] = random_ram(SIZE, seed=4)
            slow = {"max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 10 * MiB}
            await vm.migrate(
                named(arrival.uri),
                capabilities={"postcopy-ram": True},
                parameters={"tls-creds": ID, **slow},
                wait=False,
            )
            await arrival.wait_pages(300)
            await vm.qmp.execute("migrate-start-postcopy")
            if recovery:
                await cut_and_recover_from(vm, arrival.monitor, TLS_LISTEN)
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


async def cut_and_recover_to(vm: Qemu, monitor: trimig.Monitor, listen: str) -> None:
    """Cut the connection to a QEMU, which then listens again, and let trimig reconnect to it."""
    monitor.pause("the test cuts it")
    await vm.wait_migration_status("postcopy-paused")
    await vm.qmp.execute("migrate-recover", {"uri": listen})
    await monitor.wait_status(Status.POSTCOPY_PAUSED)
    monitor.recover(named(await vm.incoming_uri(listen)))


async def cut_and_recover_from(vm: Qemu, monitor: trimig.Monitor, listen: str) -> None:
    """Cut the connection from a QEMU when 300 pages have followed the guest, and let it reconnect to trimig."""
    await vm.wait_migration_status("postcopy-active")
    await in_postcopy_there(monitor, 300)
    monitor.pause("the test cuts it")
    await vm.wait_migration_status("postcopy-paused")
    await peers.wait_lost(monitor)
    monitor.recover(listen)
    while not monitor.addresses:
        await monitor.wait_changed()
    await vm.qmp.execute("migrate", {"uri": named(monitor.addresses[0]), "resume": True})


# -- recovery that fails -----------------------------------------------------------------------------------------------


async def mute_listener(act: Callable[[str], Awaitable[None]], said: bytes) -> None:
    """A listener that accepts a connection, sends *said*, and closes: no peer."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        host, port = listener.socket.getsockname()[:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(act, f"tcp:{host}:{port}")
            async with await listener.accept() as stream:
                await stream.send_all(said)


async def test_double_failure_of_our_source(tmp_path: Path) -> None:
    """A.2, recovery/double-failures: the handshake is answered with one byte and a close, then there is no listener;
    paused each time, and the third attempt succeeds."""
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(peers.LISTEN)
            monitor = trimig.Monitor()
            seen: list[Any] = []
            monitor.add_listener(lambda event: seen.append(event))

            async def recover(to: str) -> None:
                await trio.lowlevel.checkpoint()
                monitor.recover(to)

            async def steer() -> None:
                await after_pages(monitor, 500)
                await in_postcopy(monitor, 0.2)
                monitor.pause("the test cuts it")
                await vm.wait_migration_status("postcopy-paused")
                await monitor.wait_status(Status.POSTCOPY_PAUSED)
                await mute_listener(recover, b"\x00")
                await monitor.wait_status(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)
                await monitor.wait_status(Status.POSTCOPY_PAUSED)
                monitor.recover(f"unix:{tmp_path}/absent")
                while not any(event.name == "RECOVERY_FAILED" for event in seen):
                    await monitor.wait_changed()
                assert monitor.status is Status.POSTCOPY_PAUSED
                await vm.qmp.execute("migrate-recover", {"uri": peers.LISTEN})
                monitor.recover(await vm.incoming_uri(peers.LISTEN))

            await peers.while_migrating(guest, uri, config(background=20 * MiB), monitor, steer)
            await vm.wait_migration_status("completed")
            assert np.array_equal(vm.ram, peers.memory(guest))


async def test_double_failure_of_our_destination() -> None:
    """A.2: two connections of strangers are dropped; then the QEMU comes."""
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest, config()) as arrival, Qemu.start("none", "16M") as vm:
            vm.ram[:] = random_ram(SIZE, seed=5)
            monitor = arrival.monitor
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                parameters={
                    "max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 10 * MiB
                },
                wait=False,
            )  # fmt: skip
            await arrival.wait_pages(300)
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("postcopy-active")
            await in_postcopy_there(monitor, 300)
            await vm.qmp.execute("migrate-pause")
            await peers.wait_lost(monitor)
            await vm.wait_migration_status("postcopy-paused")
            monitor.recover(peers.LISTEN)
            while not monitor.addresses:
                await monitor.wait_changed()
            host, _, port = monitor.addresses[0].removeprefix("tcp:").rpartition(":")
            for number, said in enumerate((b"", b"no stream at all"), 1):
                async with await trio.open_tcp_stream(host, int(port)) as stream:
                    await stream.send_all(said) if said else await trio.lowlevel.checkpoint()
                await arrival.dropped(number)
            await vm.qmp.execute("migrate", {"uri": monitor.addresses[0], "resume": True})
            await vm.wait_migration_status("completed")
            assert (await arrival.summary()).confirmed
            assert np.array_equal(np.asarray(guest.ram[0].pages).reshape(-1), vm.ram)


async def test_killed_destination_leaves_the_source_paused_with_all_it_has() -> None:
    """B.7 42, S of issue 4's real processes: SIGKILL in postcopy-active. The error reports the destination as the
    owner."""
    with trio.fail_after(peers.LIMIT), peers.source(SIZE) as guest:
        async with Qemu.start("none", "16M", incoming="defer") as vm:
            await vm.set_capabilities({"postcopy-ram": True})
            uri = await vm.incoming(peers.LISTEN)
            monitor = trimig.Monitor()

            async def kill() -> None:
                await after_pages(monitor, 500)
                await in_postcopy(monitor, 0.2)
                vm.kill()
                await monitor.wait_status(Status.POSTCOPY_PAUSED)
                with pytest.raises(trimig.StateError, match="needed there"):
                    monitor.cancel("is it too late?")
                monitor.abandon("the destination was killed")

            with pytest.raises(trimig.PostcopyLost, match="the destination was killed") as caught:
                await peers.while_migrating(guest, uri, config(background=10 * MiB), monitor, kill)
    assert caught.value.owner is trimig.Ownership.DESTINATION
    assert guest.run_state == "paused"


async def test_killed_source_leaves_a_destination_that_names_what_it_lacks() -> None:
    """When all is lost: the error names the missing pages, and the received pages are kept."""
    with trimig.ParkedGuest() as guest:
        async with peers.arriving(guest, config()) as arrival, Qemu.start("none", "16M") as vm:
            vm.ram[:] = random_ram(SIZE, seed=6)
            content = vm.ram.copy()
            await vm.migrate(
                arrival.uri,
                capabilities={"postcopy-ram": True},
                parameters={
                    "max-bandwidth": 10 * MiB, "downtime-limit": 1, "max-postcopy-bandwidth": 4 * MiB
                },
                wait=False,
            )  # fmt: skip
            await arrival.wait_pages(300)
            await vm.qmp.execute("migrate-start-postcopy")
            await vm.wait_migration_status("postcopy-active")
            await in_postcopy_there(arrival.monitor, 300)
            vm.kill()
            await peers.wait_lost(arrival.monitor)
            in_doubt = arrival.monitor.status is Status.POSTCOPY_UNCERTAIN
            arrival.monitor.abandon("the source was killed")
            lost = await arrival.error()
            # A QEMU that asks for the proof may have taken its guest back before it was killed.
            assert isinstance(lost, trimig.PostcopyLost | trimig.HandoverUncertain)
            assert isinstance(lost, trimig.HandoverUncertain) is in_doubt
            ((_, runs),) = arrival.monitor.counters.missing.items()
            if isinstance(lost, trimig.PostcopyLost):
                assert dict(lost.missing) == {"m0": runs}
            here = np.ones(SIZE // 4096, np.bool_)
            for first, end in runs:
                here[first:end] = False
            assert 600 <= here.sum() < len(here)
            assert np.array_equal(guest.ram[0].pages[here], content.reshape(-1, 4096)[here])
