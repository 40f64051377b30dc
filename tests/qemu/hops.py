"""One migration between trimig and a QEMU in each mode of the matrix, in either direction."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import pytest
import trio

import trimig
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.relay import exec_relay
from tests.qemu.test_tls import x509
from tests.transport.pki import ID, Pki
from trimig import MiB, Status

#: Starts another QEMU.
Spare: TypeAlias = Callable[[], AbstractAsyncContextManager[Qemu]]

UUID: Final = "00112233-4455-6677-8899-aabbccddeeff"
#: Bytes per second at which a guest of this size never completes before the test acts.
SLOW: Final = 1 * MiB
POSTCOPY: Final = ("postcopy", "preempt", "recovery")
_CAPABILITIES: Final[Mapping[str, Sequence[str]]] = {
    "postcopy": ("postcopy-ram",),
    "preempt": ("postcopy-ram", "postcopy-preempt"),
    "recovery": ("postcopy-ram",),
    "pause": ("pause-before-switchover",),
    "uuid": ("validate-uuid",),
    "ack": ("switchover-ack",),
    "snapshot": ("background-snapshot",),
}
#: The modes in which no answer can come, or none is wanted.
_ONE_WAY: Final = ("one-way", "snapshot", "file")


@dataclasses.dataclass
class Hop:
    """The settings of both sides for one mode.

    Attributes:
        mode: one of :data:`tests.qemu.cells.MODES`.
        directory: for sockets and files.
        pki: makes certificates.
        trickle: bytes per second for the remaining pages in postcopy, if the connection is to be cut in the middle.
    """

    mode: str
    directory: Path
    pki: Pki
    trickle: int = 512 << 10
    ours: int | None = dataclasses.field(default=None, init=False)
    theirs: int | None = dataclasses.field(default=None, init=False)

    def __enter__(self) -> Self:
        if self.mode == "fd":
            one, other = socket.socketpair()
            self.ours, self.theirs = one.detach(), other.detach()
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the unused descriptors."""
        if self.theirs is not None:
            os.close(self.theirs)
        if self.ours is not None:
            with contextlib.suppress(OSError):  # a migration closes it
                os.close(self.ours)

    # -- the settings of QEMU
    # ----------------------------------------------------------------------------------------------

    def arguments(self, endpoint: str) -> list[str]:
        """Further arguments of QEMU; *endpoint* is ``"client"`` for a source and ``"server"`` for a destination."""
        if self.mode == "uuid":
            return ["-uuid", UUID]
        return x509(self.pki.make(endpoint), endpoint) if self.mode == "tls" else []

    async def prepare(self, vm: Qemu, *, source: bool) -> None:
        """Set the capabilities and parameters of a QEMU."""
        names = _CAPABILITIES.get(self.mode, ())
        if not source:  # the following settings are only for a source
            names = [name for name in names if name not in ("pause-before-switchover", "validate-uuid")]
        capabilities = dict.fromkeys(names, True)
        await vm.set_capabilities({"return-path": self.mode not in _ONE_WAY, **capabilities})
        parameters: dict[str, Any] = {"max-bandwidth": 0, "downtime-limit": 300}
        if self.mode in POSTCOPY:
            parameters = {"max-bandwidth": SLOW, "downtime-limit": 1}
        if self.mode == "recovery":
            parameters["max-postcopy-bandwidth"] = self.trickle
        if self.mode == "tls":
            parameters["tls-creds"] = ID
        await vm.set_parameters(parameters)
        if self.theirs is not None:
            await vm.qmp.execute("getfd", {"fdname": "migration"}, fd=self.theirs)
            os.close(self.theirs)
            self.theirs = None

    # -- the settings of trimig
    # --------------------------------------------------------------------------------------------

    def config(self, vm: Qemu, *, source: bool) -> trimig.Config:
        """The configuration of trimig's side; *vm* is the other side."""
        slow = self.mode in POSTCOPY
        config = trimig.Config(
            capabilities=trimig.Capabilities(return_path=self.mode not in _ONE_WAY),
            parameters=trimig.Parameters(
                max_bandwidth=SLOW if slow else 0,
                downtime_limit=1 if slow else 300,
                max_postcopy_bandwidth=self.trickle if self.mode == "recovery" else 0,
            ),
        )
        names = _CAPABILITIES.get(self.mode, ())
        if not source or self.mode == "snapshot":  # the following settings are only for a source
            names = [name for name in names if name.startswith("postcopy") or name == "switchover-ack"]
        config = config.with_options(capabilities=names)
        if self.mode == "ack" and vm.machine == "none" and vm.installed.numbers >= (11, 1):
            # A machine type without a version is as new as the program, which the stream does not tell.
            config = dataclasses.replace(config, peer=dataclasses.replace(config.peer, switchover_ack_legacy=False))
        if self.mode == "tls":
            config = config.with_options(tls=self.pki.make("client" if source else "server"))
        return config

    # -- addresses -----------------------------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """A socket, or a file."""
        return self.directory / "path"

    async def opened_at(self, vm: Qemu) -> str:
        """Let a QEMU listen; the address for trimig's side."""
        match self.mode:
            case "unix" | "exec":
                uri = await vm.incoming(f"unix:{self.path}")
                return exec_relay("connect", self.path) if self.mode == "exec" else uri
            case "fd":
                await vm.incoming("fd:migration")
                return f"fd:{self.ours}"
            case "channels":
                address = {"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "0"}
                channels = [{"channel-type": "main", "addr": address}]
                await vm.qmp.execute("migrate-incoming", {"channels": channels})
                return await vm.incoming_uri("unknown")
            case "tls":
                return _named(await vm.incoming("tcp:localhost:0"))
        return await vm.incoming(peers.LISTEN)

    @property
    def listen(self) -> str:
        """The address at which trimig's side listens."""
        if self.mode == "fd":
            return f"fd:{self.ours}"
        if self.mode == "tls":
            return "tcp:localhost:0"
        return f"unix:{self.path}" if self.mode in ("unix", "exec") else peers.LISTEN

    async def begin(self, vm: Qemu, uri: str) -> None:
        """``migrate`` at a QEMU to the address of trimig."""
        arguments: dict[str, Any] = {"uri": _named(uri) if self.mode == "tls" else uri}
        if self.mode == "exec":
            arguments = {"uri": exec_relay("connect", self.path)}
        elif self.mode == "fd":
            arguments = {"uri": "fd:migration"}
        elif self.mode == "channels":
            host, _, port = uri.removeprefix("tcp:").rpartition(":")
            address = {"transport": "socket", "type": "inet", "host": host, "port": port}
            arguments = {"channels": [{"channel-type": "main", "addr": address}]}
        await vm.qmp.execute("migrate", arguments)


def _named(uri: str) -> str:
    """With the name that is in the certificates."""
    return uri.replace("127.0.0.1", "localhost").replace("[::1]", "localhost")


# -- to QEMU -----------------------------------------------------------------------------------------------------------


async def send(hop: Hop, guest: trimig.Guest, vm: Qemu, spare: Spare) -> None:
    """Send a guest of trimig to a QEMU that waits with ``incoming="defer"``, and wait until both have completed.

    *spare* starts another QEMU of the same kind, for an attempt that is cancelled.
    """
    if hop.mode == "file":
        await trimig.migrate(guest, f"file:{hop.path}", hop.config(vm, source=True))
        await hop.prepare(vm, source=False)
        newer = vm.installed.numbers >= (8, 2)
        await vm.incoming(f"file:{hop.path}" if newer else f"exec:cat {hop.path}")
        await vm.wait_status("running")
        return
    if hop.mode == "again":
        async with spare() as other:
            await _send_and_cancel(hop, guest, other)
    await hop.prepare(vm, source=False)
    uri = await hop.opened_at(vm)
    monitor = trimig.Monitor()
    steer = {
        "pause": functools.partial(_continue, monitor, vm),
        "postcopy": functools.partial(_switch, monitor),
        "preempt": functools.partial(_switch, monitor),
        "recovery": functools.partial(_switch_and_cut, monitor, vm),
    }.get(hop.mode, trio.lowlevel.checkpoint)
    summary = await peers.while_migrating(guest, uri, hop.config(vm, source=True), monitor, steer)
    assert summary.confirmed is (hop.mode not in _ONE_WAY)
    await vm.wait_migration_status("completed")
    await vm.wait_status("running")
    if hop.mode in POSTCOPY:
        assert "postcopy-active" in vm.migration_statuses()


async def _switch(monitor: trimig.Monitor) -> None:
    await _moved(monitor, 1)
    monitor.start_postcopy()


async def _moved(monitor: trimig.Monitor, pages: int) -> None:
    """Wait until that many more pages have been sent or received."""
    before = monitor.statistics()
    async for picture in monitor.watch(0.01):
        if picture.normal_pages + picture.zero_pages - before.normal_pages - before.zero_pages >= pages:
            break


async def _switch_and_cut(monitor: trimig.Monitor, vm: Qemu) -> None:
    await _switch(monitor)
    for _ in range(2):
        await monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await _moved(monitor, 1)
        monitor.pause("the test cuts it")
        await vm.wait_migration_status("postcopy-paused")
        await vm.qmp.execute("migrate-recover", {"uri": peers.LISTEN})
        await monitor.wait_status(Status.POSTCOPY_PAUSED)
        monitor.recover(await vm.incoming_uri(peers.LISTEN))
        await monitor.wait_status(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)  # a QEMU can be through in 2 ms


async def _continue(monitor: trimig.Monitor, vm: Qemu) -> None:
    await monitor.wait_status(Status.PRE_SWITCHOVER)
    assert await vm.query_status() == "inmigrate"
    monitor.resume()


async def _send_and_cancel(hop: Hop, guest: trimig.Guest, vm: Qemu) -> None:
    """An attempt that is cancelled while memory is being sent."""
    uri = await hop.opened_at(vm)
    monitor = trimig.Monitor()
    config = hop.config(vm, source=True)
    slow = dataclasses.replace(config, parameters=config.parameters.replace(max_bandwidth=SLOW, downtime_limit=1))

    async def cancel() -> None:
        await _moved(monitor, 1)
        monitor.cancel("the test")

    with pytest.raises(trimig.MigrationCancelled):
        await peers.while_migrating(guest, uri, slow, monitor, cancel)
    assert await vm.wait_exit() == 1


# -- from QEMU ---------------------------------------------------------------------------------------------------------


async def receive(hop: Hop, vm: Qemu, make: Callable[[], trimig.ParkedGuest]) -> trimig.ParkedGuest:
    """Let a QEMU send its guest to trimig, and wait until both have completed."""
    if hop.mode == "file":
        return await _received_from_a_file(hop, vm, make)
    await hop.prepare(vm, source=True)
    if hop.mode == "again":
        await _receive_and_cancel(hop, vm, make)
    guest = make()
    async with peers.arriving(guest, hop.config(vm, source=False), uri=hop.listen) as arrival:
        await hop.begin(vm, arrival.uri)
        match hop.mode:
            case "pause":
                await vm.wait_migration_status("pre-switchover")
                assert not arrival.done.is_set()
                await vm.qmp.execute("migrate-continue", {"state": "pre-switchover"})
            case "postcopy" | "preempt" | "recovery":
                await _moved(arrival.monitor, 1)
                await vm.qmp.execute("migrate-start-postcopy")
        if hop.mode == "recovery":
            await _cut_twice(vm, arrival.monitor)
        await vm.wait_migration_status("completed")
        summary = await arrival.summary()
    assert summary.confirmed is (hop.mode not in _ONE_WAY)
    if hop.mode in POSTCOPY:
        assert "postcopy-active" in vm.migration_statuses()
    return guest


async def _cut_twice(vm: Qemu, monitor: trimig.Monitor) -> None:
    """A QEMU source is paused, once by trimig and once by itself; it reconnects both times."""
    for ours in (True, False):
        await monitor.wait_status(Status.POSTCOPY_ACTIVE)
        await vm.wait_migration_status("postcopy-active")
        await _moved(monitor, 1)
        if ours:
            monitor.pause("the test cuts it")
        else:
            await vm.qmp.execute("migrate-pause")
        await peers.wait_lost(monitor)
        await vm.wait_migration_status("postcopy-paused")
        monitor.recover(peers.LISTEN)
        while not monitor.addresses:
            await monitor.wait_changed()
        await vm.qmp.execute("migrate", {"uri": monitor.addresses[0], "resume": True})
        await monitor.wait_status(Status.POSTCOPY_RECOVER, Status.POSTCOPY_ACTIVE)  # a QEMU can be through in 2 ms


async def _received_from_a_file(hop: Hop, vm: Qemu, make: Callable[[], trimig.ParkedGuest]) -> trimig.ParkedGuest:
    await hop.prepare(vm, source=True)
    part = f"{hop.path}.part"
    if vm.installed.numbers >= (8, 2):
        await vm.migrate(f"file:{hop.path}")
    else:
        await vm.migrate(f"exec:cat > {part} && mv {part} {hop.path}")
    while True:  # QEMU completes a little earlier than the command
        if await trio.Path(hop.path).exists():
            break
        await trio.sleep(0.01)
    guest = make()
    await trimig.receive(guest, f"file:{hop.path}", hop.config(vm, source=False))
    return guest


async def _receive_and_cancel(hop: Hop, vm: Qemu, make: Callable[[], trimig.ParkedGuest]) -> None:
    """An attempt that is cancelled at the QEMU while memory is being sent; its guest runs on."""
    await vm.set_parameters({"max-bandwidth": SLOW, "downtime-limit": 1})
    with make() as guest:
        async with peers.arriving(guest, hop.config(vm, source=False)) as arrival:
            await hop.begin(vm, arrival.uri)
            await _moved(arrival.monitor, 1)
            await vm.qmp.execute("migrate_cancel")
            await vm.wait_migration_status("cancelled", fail_on=())
            assert (await arrival.error()).owner is trimig.Ownership.SOURCE
    await vm.wait_status("running")
    await vm.set_parameters({"max-bandwidth": 0, "downtime-limit": 300})
