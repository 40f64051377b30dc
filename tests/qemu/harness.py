"""Real QEMU processes as migration peers.

QEMU runs without KVM (``-accel tcg``), without display and default devices. It inherits the monitor, a socket pair, and
the guest RAM, a memfd. So there is nothing to wait for, to clean up or to agree on in the file system. The kernel
chooses TCP ports (port 0), and QEMU reports them. The process is always gone at the end of the context, and a failure
shows its stderr. Any QEMU of :mod:`tests.qemu.installed` can be used.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from tests.qemu import installed as qemus
from tests.qemu.installed import Installed
from tests.qemu.qmp import QmpClient, QmpClosed, QmpError

#: A machine type: ``"none"``, ``"pc"``, ``"q35"``, ``"microvm"``, ``"pc-i440fx-7.2"``, …
Machine = str

#: Name of the RAM block on the wire, and id of the memory backend.
RAM_BLOCK: Final = "m0"
#: Seconds in which a QEMU must open its monitor, or be gone after SIGKILL. Far more than a loaded machine needs.
_START_LIMIT: Final = 30.0
_KILL_LIMIT: Final = 10.0
#: With less than one cylinder SeaBIOS sees no disk on q35.
_DISK_SIZE: Final = 1 << 20
#: Seconds between two polls of a state without notifications.
_POLL: Final = 0.01

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """``"64M"`` to bytes."""
    return int(text[:-1]) * _UNITS[text[-1]]


def random_ram(size: int, *, seed: int) -> NDArray[np.uint8]:
    """*size* reproducible random bytes."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


class QemuExited(Exception):
    """QEMU ended although the test needs it; its stderr is in the notes."""


class Qemu:
    """One running QEMU. Get it from :meth:`start`.

    Attributes:
        qmp: its monitor.
        pid: its process id.
        installed: the QEMU that runs.
        machine: its machine type, as the test asked for it.
        ram: guest memory, shape ``(size,)``, writable and shared with QEMU; None without a memory file.
    """

    def __init__(
        self,
        process: trio.Process,
        qmp: QmpClient,
        ram: NDArray[np.uint8] | None,
        directory: Path,
        installed: Installed,
        machine: Machine,
    ) -> None:
        self.qmp = qmp
        self.machine = machine
        self.installed = installed
        self.pid = process.pid
        self._process = process
        self._ram = ram
        self._directory = directory

    @property
    def ram(self) -> NDArray[np.uint8]:
        if self._ram is None:
            raise ValueError("this QEMU was started with memory_file=False")
        return self._ram

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        machine: Machine = "none",
        ram: str = "64M",
        *,
        version: str | None = None,
        incoming: str | None = None,
        memory_file: Path | bool = True,
        boot: bytes | None = None,
        paused: bool = False,
        extra: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> AsyncIterator[Qemu]:
        """Run a QEMU while the block lasts.

        Args:
            machine: its type.
            ram: size, as QEMU spells it.
            version: of the QEMU, such as ``"10.0"``; None is the default one (:mod:`tests.qemu.installed`).
            incoming: ``"defer"`` (then call :meth:`incoming`), a URI, or None for a source.
            memory_file: True keeps RAM in a memfd, a path in that file, both shared (``vm.ram``); False leaves RAM to
                QEMU, whose block then has the machine's own name (``pc.ram``) instead of ``m0``.
            boot: image of its hard disk, for example of :func:`tests.qemu.bootsector.boot_sector`.
            paused: ``-S``: do not run before ``cont``.
            extra: further arguments.
            pass_fds: descriptors QEMU inherits, for ``fd:`` URIs.

        Raises:
            QemuExited: QEMU did not start.
            FileNotFoundError: there is no such QEMU.

        **Cancellation:** the process is killed and reaped.
        """
        installed = qemus.choose(version)
        async with contextlib.AsyncExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimig-qemu-")))
            argv = [
                *installed.command,
                "-accel",
                "tcg",
                "-display",
                "none",
                "-nodefaults",
                "-no-user-config",
                "-m",
                ram,
            ]
            inherited = list(pass_fds)
            view: NDArray[np.uint8] | None = None
            if memory_file is False:
                argv += ["-M", machine]
            else:
                path, view = _memory(stack, inherited, memory_file, parse_size(ram))
                argv += ["-M", f"{machine},memory-backend={RAM_BLOCK}"]
                argv += ["-object", f"memory-backend-file,id={RAM_BLOCK},share=on,size={ram},mem-path={path}"]
            if machine != "none":
                argv += ["-chardev", f"file,id=serial0,path={directory}/serial", "-serial", "chardev:serial0"]
            if boot is not None:
                # A copy for each QEMU, because two of them must not lock the same image.
                (directory / "disk").write_bytes(boot.ljust(_DISK_SIZE, b"\0"))
                argv += ["-drive", f"if=ide,format=raw,file={directory}/disk"]
            if paused:
                argv += ["-S"]
            if incoming is not None:
                argv += ["-incoming", incoming]
            ours, theirs = socket.socketpair()
            qmp = QmpClient(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
            stack.push_async_callback(qmp.aclose)
            with theirs, (directory / "stderr").open("wb") as stderr:
                inherited.append(theirs.fileno())
                argv += ["-chardev", f"socket,id=qmp0,fd={theirs.fileno()}", "-mon", "chardev=qmp0,mode=control"]
                process = await trio.lowlevel.open_process(
                    [*argv, *extra],
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    pass_fds=inherited,
                    env={**os.environ, **installed.environment},
                )
            stack.push_async_callback(_kill, process)
            vm = cls(process, qmp, view, directory, installed, machine)
            stack.push(vm._explain)
            try:
                with trio.fail_after(_START_LIMIT):
                    await qmp.negotiate()
                    # With events qemu.qmp.events has each change of status, also those that polling would miss.
                    await vm.set_capabilities({"events": True})
            except QmpClosed as exc:
                raise QemuExited(f"QEMU did not start: {' '.join(argv)}") from exc
            yield vm

    # The output of QEMU, and whether it runs

    def stderr_text(self) -> str:
        """The output of QEMU on stdout and stderr so far."""
        return (self._directory / "stderr").read_text(errors="replace")

    def serial_text(self) -> str:
        """The output of the guest on COM1 so far."""
        return (self._directory / "serial").read_bytes().decode("ascii", errors="replace")

    async def wait_serial(self, predicate: Callable[[str], bool]) -> str:
        """Wait until *predicate* holds for :meth:`serial_text`, and return that text."""
        while not predicate(text := self.serial_text()):
            if self._process.poll() is not None:
                raise QemuExited("QEMU exited while its serial port was being watched")
            await trio.sleep(_POLL)
        return text

    async def wait_exit(self) -> int:
        """Wait until QEMU has exited by itself; its return code. QEMU 7.2 exits with 1 when incoming migration
        fails."""
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._process.kill()

    async def quit(self) -> int:
        """Ask QEMU to quit and wait for its exit; its return code."""
        with contextlib.suppress(QmpClosed):  # QEMU may exit before its answer is read
            await self.qmp.execute("quit")
        return await self._process.wait()

    # Migration

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        """``migrate-set-capabilities``, names in QMP spelling."""
        rows = [{"capability": name, "state": state} for name, state in capabilities.items()]
        if rows:
            await self.qmp.execute("migrate-set-capabilities", {"capabilities": rows})

    async def set_parameters(self, parameters: Mapping[str, Any]) -> None:
        """``migrate-set-parameters``, names in QMP spelling."""
        if parameters:
            await self.qmp.execute("migrate-set-parameters", parameters)

    async def migrate(
        self,
        uri: str,
        *,
        capabilities: Mapping[str, bool] | None = None,
        parameters: Mapping[str, Any] | None = None,
        wait: bool = True,
    ) -> dict[str, Any]:
        """Start a migration to *uri*; with *wait* until it completed. Returns the last ``query-migrate``.

        Raises:
            QmpError: the migration was refused at once.
            AssertionError: the migration failed or was cancelled during the wait.
        """
        await self.set_capabilities(capabilities or {})
        await self.set_parameters(parameters or {})
        await self.qmp.execute("migrate", {"uri": uri})
        return await self.wait_migration_status("completed") if wait else await self.query_migrate()

    async def incoming(self, uri: str) -> str:
        """``migrate-incoming`` of a QEMU started with ``incoming="defer"``; the URI at which QEMU really listens."""
        await self.qmp.execute("migrate-incoming", {"uri": uri})
        return await self.incoming_uri(uri)

    async def incoming_uri(self, uri: str) -> str:
        """The URI at which QEMU listens, with the port that the kernel chose; *uri* itself if QEMU reports no
        socket."""
        for address in (await self.query_migrate()).get("socket-address", ()):
            if address["type"] == "inet":
                host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
                return f"tcp:{host}:{address['port']}"
            if address["type"] == "unix":
                return f"unix:{address['path']}"
        return uri

    async def query_migrate(self) -> dict[str, Any]:
        """``query-migrate``; empty before the first migration."""
        answer: dict[str, Any] = await self.qmp.execute("query-migrate")
        return answer

    async def query_status(self) -> str:
        """The run state: ``"running"``, ``"inmigrate"``, ``"postmigrate"``, …"""
        return str((await self.qmp.execute("query-status"))["status"])

    async def wait_status(self, *wanted: str) -> str:
        """Wait until the run state is one of *wanted*, and return it.

        QEMU changes its run state a moment after what a test waits for: the end of the stream, or the status of
        the migration.

        Raises:
            AssertionError: it is none of them after 20 s.
        """
        with trio.move_on_after(20):
            while True:
                if (status := await self.query_status()) in wanted:
                    return status
                await trio.sleep(_POLL)
        raise AssertionError(f"the run state is {await self.query_status()}, not {' or '.join(wanted)}")

    async def wait_migration_status(
        self, *wanted: str, fail_on: Sequence[str] = ("failed", "cancelled")
    ) -> dict[str, Any]:
        """Wait until the status of the migration is one of *wanted*; the ``query-migrate`` that shows it.

        Raises:
            AssertionError: it is one of *fail_on* (and not wanted).
        """
        while (info := await self.query_migrate()).get("status") not in wanted:
            if info.get("status") in fail_on:
                raise AssertionError(f"migration is {info['status']}, not {wanted}: {info.get('error-desc', info)}")
            await trio.sleep(_POLL)
        return info

    def migration_statuses(self) -> list[str]:
        """Every status of a migration so far, as far as events have been read (any QMP call reads them)."""
        return [event["data"]["status"] for event in self.qmp.events if event["event"] == "MIGRATION"]

    def main_statuses(self) -> list[str]:
        """The same without ``device``, which versions from 10.0 on show of each migration, and older ones of few."""
        return [status for status in self.migration_statuses() if status != "device"]

    def _explain(self, _kind: type[BaseException] | None, exc: BaseException | None, _tb: object) -> bool:
        """Add the output of QEMU to a failure."""
        if exc is not None and not isinstance(exc, trio.Cancelled):
            code = self._process.poll()
            state = "running" if code is None else f"exited with {code}"
            exc.add_note(
                f"QEMU {self.installed.full}, process {self.pid} ({state}) said: {self.stderr_text().strip() or 'nothing'}"
            )
        return False


async def _kill(process: trio.Process) -> None:
    """SIGKILL, and reap: within a time limit, and in spite of a cancellation."""
    if process.poll() is None:
        process.kill()
    with trio.move_on_after(_KILL_LIMIT, shield=True):
        await process.wait()
        return
    raise RuntimeError(f"QEMU {process.pid} outlived SIGKILL for {_KILL_LIMIT} s")


def _memory(
    stack: contextlib.AsyncExitStack, inherited: list[int], memory_file: Path | bool, size: int
) -> tuple[str, NDArray[np.uint8]]:
    """A shared mapping of the future guest RAM, and the path by which QEMU opens the same memory."""
    if isinstance(memory_file, Path):
        path = str(memory_file)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    else:
        fd = os.memfd_create("trimig-test-ram")
        # QEMU resolves the path in its own process, where the descriptor has the same number.
        path = f"/proc/self/fd/{fd}"
        inherited.append(fd)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    view = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
    return path, view


async def write_capture(path: Path, machine: Machine, *, boot: bytes | None = None, ram: str = "16M") -> None:
    """Write the stream that a QEMU of that type sends to a file: the plain stream, without return path.

    ``none`` gets random memory; a machine with a boot sector is saved while it counts.
    """
    async with Qemu.start(machine, ram, boot=boot) as vm:
        if machine == "none":
            # Pages of each kind: random pages, pages of one repeated byte, and (most) zero pages.
            vm.ram[: 1 << 20] = random_ram(1 << 20, seed=1)
            vm.ram[2 << 20 : 3 << 20] = 0x5A
        if boot is not None:
            await vm.wait_serial(lambda text: text.count("\n") >= 3)
        # "completed" is reported before the pipe to cat is closed; the rename comes after it.
        await vm.migrate(f"exec:cat > '{path}.part' && mv '{path}.part' '{path}'")
        while True:
            if await trio.Path(path).exists():
                return
            await trio.sleep(_POLL)


__all__ = [
    "RAM_BLOCK",
    "Installed",
    "Machine",
    "Qemu",
    "QemuExited",
    "QmpClosed",
    "QmpError",
    "parse_size",
    "random_ram",
    "write_capture",
]
