"""``exec:``, ``fd:`` and ``file:`` with a real QEMU at the other end, or as the reader of a stored stream."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trimig
from tests.conftest import LeakCheck
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.relay import exec_relay
from trimig import MiB
from trimig.wire import encoder as wire
from trimig.wire.return_path import Pong, encode

pytestmark = pytest.mark.qemu

SIZE = 16 * MiB


async def exists(path: Path) -> None:
    """Wait for a file that another process makes."""
    while True:
        if await trio.Path(path).exists():
            return
        await trio.sleep(0.01)


@asynccontextmanager
async def receiving(guest: trimig.AppGuest, uri: str) -> AsyncIterator[list[trimig.Summary]]:
    """Receive beside the block, to the end; then the list has the summary."""
    summaries: list[trimig.Summary] = []

    async def receive() -> None:
        summaries.append(await trimig.receive(guest, uri, peers.settings()))

    with trio.fail_after(peers.LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            yield summaries


class Monitor:
    """A second monitor of a QEMU, which carries descriptors. A command is a line and its answer one; nothing waits."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._rest = b""

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator[Monitor]:
        """Connect and negotiate."""
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.connect(str(path))
            monitor = cls(sock)
            await monitor.execute("qmp_capabilities")
            yield monitor

    async def execute(self, name: str, *, fd: int | None = None, **arguments: str) -> dict[str, Any]:
        """The answer to a command, also an error; *fd* goes with the command."""
        line = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        extra = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        await self._socket.sendmsg([line], extra)
        while True:
            while b"\n" not in self._rest:
                self._rest += await self._socket.recv(65536)
            text, _, self._rest = self._rest.partition(b"\n")
            answer: dict[str, Any] = json.loads(text)
            if "return" in answer or "error" in answer:
                return answer

    async def getfd(self, name: str, fd: int) -> None:
        """Pass a descriptor on; this process closes its own."""
        assert await self.execute("getfd", fd=fd, fdname=name) == {"return": {}}
        os.close(fd)

    async def check_consumed(self, name: str) -> None:
        """A.1 row 16: QEMU no longer has a used descriptor."""
        answer = await self.execute("closefd", fdname=name)
        assert f"'{name}' not found" in answer["error"]["desc"]


def with_monitor(tmp_path: Path) -> list[str]:
    """The arguments that give QEMU this monitor, at ``tmp_path/qmp``."""
    return ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]


# -- exec --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_path", [False, True])
async def test_what_exec_and_file_store_a_stock_qemu_loads(tmp_path: Path, *, return_path: bool) -> None:
    """B1, B3: stored by a command or by file:, behind an offset too; every byte of RAM, and it runs.

    With a return path requested as well: a command that stores the stream has no answer, and that is no error.
    """
    stored = {
        "command": (f"exec:cat > {tmp_path}/command", f"exec:cat {tmp_path}/command"),
        "zipped": (f"exec:gzip -1 > {tmp_path}/zipped", f"exec:zcat {tmp_path}/zipped"),
        "file": (f"file:{tmp_path}/file", f"exec:cat {tmp_path}/file"),
        "offset": (f"file:{tmp_path}/offset,offset=1M", f"exec:tail -c +{MiB + 1} {tmp_path}/offset"),
    }
    for name, (store, load) in stored.items():
        with peers.source(SIZE) as guest:
            summary = await trimig.migrate(guest, store, peers.settings(return_path=return_path))
            assert guest.run_state == "paused"
            assert not summary.prepared
            assert (tmp_path / name).stat().st_size > SIZE // 4
            async with peers.target(SIZE, uri=load) as (vm, _):
                assert await vm.wait_status("running", "paused") == "running"
                assert np.array_equal(vm.ram, peers.memory(guest))


async def test_what_a_qemu_stores_is_loaded_by_exec_and_file(tmp_path: Path) -> None:
    """B3, B7: every byte of RAM; a stored stream has no peer that could read an answer."""
    async with Qemu.start("none", f"{SIZE >> 20}M") as vm:
        peers.mix(vm.ram, seed=2)
        wanted = vm.ram.copy()
        await vm.migrate(f"exec:cat > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/stream")
        with trio.fail_after(peers.LIMIT):
            await exists(tmp_path / "stream")
    shifted = b"x" * 512 + (tmp_path / "stream").read_bytes()
    (tmp_path / "shifted").write_bytes(shifted)
    for uri in (
        f"exec:cat {tmp_path}/stream",
        f"exec:tail -c +513 < {tmp_path}/shifted",
        f"file:{tmp_path}/stream",
        f"file:{tmp_path}/shifted,offset=0x200",
    ):
        with peers.machine(SIZE, running=False) as guest:
            with trio.fail_after(peers.LIMIT):
                await trimig.receive(guest, uri)
            assert guest.run_state == "running"
            assert np.array_equal(peers.memory(guest), wanted)


async def test_command_that_passes_the_stream_on_brings_the_answer_back(tmp_path: Path) -> None:
    """B3: exec: with a return path, to QEMU: prepared, confirmed, every byte."""
    async with peers.target(SIZE, uri=f"unix:{tmp_path}/socket") as (vm, _):
        with peers.source(SIZE) as guest:
            summary = await trimig.migrate(guest, exec_relay("connect", tmp_path / "socket"), peers.settings())
            assert summary.prepared
            assert summary.confirmed
            assert await vm.wait_status("running", "paused") == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))


async def test_command_that_brings_the_stream_takes_the_answer_back(tmp_path: Path) -> None:
    """B7: exec: at the destination of a QEMU that waits for SHUT."""
    with peers.machine(SIZE, running=False) as guest:
        async with Qemu.start("none", f"{SIZE >> 20}M") as vm:
            peers.mix(vm.ram, seed=3)
            async with receiving(guest, exec_relay("listen", tmp_path / "socket")) as summaries:
                await exists(tmp_path / "socket")
                await vm.migrate(f"unix:{tmp_path}/socket", capabilities={"return-path": True})
            (summary,) = summaries
            assert summary.confirmed
            assert guest.run_state == "running"
            assert np.array_equal(peers.memory(guest), vm.ram)


async def test_refusal_of_a_qemu_behind_a_command_leaves_the_guest_here(tmp_path: Path) -> None:
    """L9, B3: QEMU exits, without a message before 10.0; the command ends with it."""
    async with peers.target(SIZE, uri=f"unix:{tmp_path}/socket") as (vm, _):
        with peers.source(SIZE, block="other") as guest:
            with pytest.raises((trimig.TransportFailed, trimig.PeerFailed)) as caught:
                await trimig.migrate(guest, exec_relay("connect", tmp_path / "socket"), peers.settings())
            assert caught.value.owner is trimig.Ownership.SOURCE
            assert guest.run_state == "running"
            assert await vm.wait_exit() == 1


async def test_command_that_fails_before_the_end_is_a_migration_that_failed() -> None:
    """B3: the error has the command's stderr; the guest runs on."""
    with peers.source(SIZE) as guest:
        check = LeakCheck()
        before = peers.memory(guest).copy()
        with pytest.raises(trimig.TransportFailed, match="failed with exit status 5") as caught:
            await trimig.migrate(
                guest, "exec:head -c 200000 > /dev/null; echo full >&2; exit 5", peers.settings(return_path=False)
            )
        assert caught.value.owner is trimig.Ownership.SOURCE
        assert guest.run_state == "running"
        assert np.array_equal(peers.memory(guest), before)
        assert check.leaks() == []
        await peers.accepted(guest)


async def test_command_that_fails_with_all_of_the_stream_leaves_the_guest_paused_here() -> None:
    """B3: QEMU completes, and the guest may be lost (stream.md part 13).

    trimig does not report success: a process behind the command may have the whole guest, so the user settles the
    owner.
    """
    with peers.source(SIZE) as guest:
        check = LeakCheck()
        before = peers.memory(guest).copy()
        with pytest.raises(trimig.HandoverUncertain, match="failed with exit status 5") as caught:
            await trimig.migrate(guest, "exec:cat > /dev/null; exit 5", peers.settings(return_path=False))
        assert guest.run_state != "running"
        assert np.array_equal(peers.memory(guest), before)
        assert check.leaks() == []
        await caught.value.settle(trimig.Ownership.SOURCE)
        assert guest.run_state == "running"
        await peers.accepted(guest)


# -- fd ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp", "pipe"])
async def test_to_a_qemu_through_a_descriptor(tmp_path: Path, kind: str) -> None:
    """B4, B7, A.1 row 16, T to Q: QEMU gets its end by getfd; both ends are consumed."""
    async with Qemu.start("none", f"{SIZE >> 20}M", incoming="defer", extra=with_monitor(tmp_path)) as vm:
        ours, theirs = _ends(kind)
        async with Monitor.open(tmp_path / "qmp") as monitor:
            await monitor.getfd("fd-mig", theirs)
            assert "return" in await monitor.execute("migrate-incoming", uri="fd:fd-mig")
            with peers.source(SIZE) as guest:
                summary = await trimig.migrate(guest, f"fd:{ours}", peers.settings())
                assert summary.prepared is summary.confirmed is (kind != "pipe")
                assert await vm.wait_status("running", "paused") == "running"
                assert np.array_equal(vm.ram, peers.memory(guest))
            await monitor.check_consumed("fd-mig")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)


@pytest.mark.parametrize("kind", ["unix", "tcp", "pipe"])
async def test_from_a_qemu_through_a_descriptor(tmp_path: Path, kind: str) -> None:
    """B4, B7, A.1 row 16, Q to T; afterwards the name is unknown to QEMU."""
    with peers.machine(SIZE, running=False) as guest:
        async with Qemu.start("none", f"{SIZE >> 20}M", extra=with_monitor(tmp_path)) as vm:
            peers.mix(vm.ram, seed=4)
            theirs, ours = _ends(kind)
            async with Monitor.open(tmp_path / "qmp") as monitor:
                await monitor.getfd("fd-mig", theirs)
                async with receiving(guest, f"fd:{ours}") as summaries:
                    await vm.set_capabilities({"return-path": kind != "pipe"})
                    # Only this monitor knows the name.
                    assert "return" in await monitor.execute("migrate", uri="fd:fd-mig")
                (summary,) = summaries
                assert summary.confirmed is (kind != "pipe")
                assert guest.run_state == "running"
                assert np.array_equal(peers.memory(guest), vm.ram)
                await monitor.check_consumed("fd-mig")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ours)


def _ends(kind: str) -> tuple[int, int]:
    """The sending side's descriptor and the receiving side's; for the tests above, trimig's or QEMU's."""
    if kind == "pipe":
        reading, writing = os.pipe()
        return writing, reading
    if kind == "unix":
        one, other = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            other, _ = server.accept()
    return one.detach(), other.detach()


# -- cancel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["setup", "active", "device"])
@pytest.mark.parametrize("scheme", ["exec", "relay", "fd", "pipe", "file"])
async def test_cancelled_after_each_status_nothing_is_left(tmp_path: Path, scheme: str, status: str) -> None:
    """F10, T3, "cancel after each status": no process, no descriptor, no file; the guest runs and goes elsewhere."""
    size = 4 * MiB
    with peers.source(size) as guest:
        before = peers.memory(guest).copy()
        async with peers.target(size, uri=f"unix:{tmp_path}/socket") as (_, _uri):
            check = LeakCheck()
            uri, other = _sink(scheme, tmp_path)
            monitor = trimig.Monitor()
            # Slow enough that "active" cannot be over before the cancel takes effect; a pipe holds a part of it unread.
            config = peers.settings(bandwidth=0 if status == "device" else 2 * MiB)
            try:
                async with trio.open_nursery() as nursery:

                    def cancel() -> None:
                        monitor.cancel("the test")

                    # A listener is told at once; a task that reads events may come too late for `device`.
                    monitor.add_listener(lambda event: cancel() if event.data.get("status") == status else None)
                    if other is not None:
                        nursery.start_soon(_drain, os.dup(other), scheme == "fd")
                    with pytest.raises(trimig.MigrationCancelled):
                        await trimig.migrate(guest, uri, config, monitor=monitor)
            finally:
                if other is not None:
                    os.close(other)
            assert monitor.status is trimig.Status.CANCELLED
            assert guest.run_state == "running"
            assert np.array_equal(peers.memory(guest), before)
            assert os.listdir(tmp_path) in ([], ["socket"])
            assert check.leaks() == []
        await peers.accepted(guest)


def _sink(scheme: str, tmp_path: Path) -> tuple[str, int | None]:
    """A URI, and the descriptor at its other end."""
    if scheme in ("fd", "pipe"):
        out, into = _ends("unix" if scheme == "fd" else "pipe")
        return f"fd:{out}", into
    if scheme == "relay":
        return exec_relay("connect", tmp_path / "socket"), None
    return {"exec": "exec:trap '' TERM; cat > /dev/null", "file": f"file:{tmp_path}/guest"}[scheme], None


async def _drain(fd: int, answers: bool) -> None:
    """Read all bytes, until the end; answer the first PING, without which no guest is stopped."""
    async with trio.lowlevel.FdStream(fd) as stream:
        said = b""
        with contextlib.suppress(
            trio.BrokenResourceError
        ):  # the cancel has closed the other end before it read the answer
            while data := await stream.receive_some():
                if answers:
                    said += data
                    if wire.ping(1) in said:
                        await stream.send_all(encode(Pong(value=1)))
                        answers = False
