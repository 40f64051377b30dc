"""A QEMU as one side: ``-M none`` with nothing but RAM, driven by QMP over its standard input and output.

Such a QEMU has no vCPU, needs no KVM and starts in 50 ms. The coordinator writes into its memory through the memfd
before the migration starts. QEMU sends that, because all pages are dirty at first.
"""

from __future__ import annotations

import collections
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trio

from bench.child import JsonChild, JsonObject, start_child
from bench.errors import BenchError
from bench.measure import guest_mapping
from bench.memory import (
    PAGE_SIZE,
    TEMPLATE_PAGES,
    UNTOUCHED,
    MemoryKind,
    as_pages,
    differing,
    expected,
    fill,
    mismatches,
)
from bench.sides import Report, Setup, Side

#: The name of the RAM block on the wire, and the name of the machine. The trimig sides use the same names.
RAM_BLOCK = "m0"
MACHINE = "none"


def qemu_command(qemu: Sequence[str], size: int, kind: MemoryKind, *, incoming: bool, prealloc: bool) -> list[str]:
    """The command line of one side."""
    backend = "memory-backend-memfd,share=on" if kind.shared else "memory-backend-ram"
    memory = f"{backend},id={RAM_BLOCK},size={size},prealloc={'on' if prealloc else 'off'}"
    command = [*qemu, "-M", f"{MACHINE},memory-backend={RAM_BLOCK}", "-m", f"size={size}b", "-object", memory]
    command += ["-nodefaults", "-display", "none", "-qmp", "stdio"]
    return [*command, "-incoming", "defer"] if incoming else command


class QemuSide(Side):
    """One QEMU process."""

    def __init__(self, child: JsonChild, role: str, setup: Setup) -> None:
        self._child = child
        self._role = role
        self._setup = setup
        self._events: collections.deque[JsonObject] = collections.deque()

    @property
    def pid(self) -> int:
        return self._child.pid

    async def prepare(self) -> None:
        """Negotiate, set the parameters, fill the source's memory."""
        way = self._setup.way
        await self._child.receive()  # the greeting
        await self.command("qmp_capabilities")
        await self.turn_on("events", "return-path", *way.capabilities)
        await self.command("migrate-set-parameters", {"max-bandwidth": 0, **way.parameters})
        if self._role == "source":
            fill(as_pages(self._map_ram()), self._setup.pages)

    async def turn_on(self, *names: str) -> None:
        """Turn capabilities on. BenchError if QEMU refuses one.

        **Cancellation:** as for :meth:`command`.
        """
        capabilities = [{"capability": name, "state": True} for name in names]
        await self.command("migrate-set-capabilities", {"capabilities": capabilities})

    async def listen(self, at: str | None = None) -> str:
        uri = at or self._setup.way.address(self._setup.directory)
        await self.command("migrate-incoming", {"uri": uri})
        if uri.startswith("unix:"):
            return uri
        answer = await self.command("query-migrate")
        host = uri.split(":")[1]
        return f"tcp:{host}:{answer['socket-address'][0]['port']}"

    async def begin(self, uri: str) -> None:
        await self._child.send({"execute": "migrate", "arguments": {"uri": uri}})

    async def finished(self) -> None:
        while True:
            message = self._events.popleft() if self._events else await self._child.receive()
            if "error" in message:
                raise BenchError(f"{self._child.name}: {message['error']['desc']}")
            status = message.get("data", {}).get("status") if message.get("event") == "MIGRATION" else None
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                answer = await self.command("query-migrate")
                raise BenchError(f"{self._child.name}: {answer.get('error-desc', status)}")

    async def report(self) -> Report:
        if self._role != "source":
            return Report()
        answer = await self.command("query-migrate")
        return Report(downtime_ms=answer["downtime"], total_ms=answer["total-time"])

    async def mismatches(self) -> int:
        if self._setup.kind(self._role).shared:
            return mismatches(as_pages(self._map_ram()), self._setup.pages)
        return self._mismatches_anonymous()

    def _map_ram(self) -> mmap.mmap:
        """The memfd behind the guest's RAM, mapped here."""
        folder = Path(f"/proc/{self.pid}/fd")
        for entry in folder.iterdir():
            if os.readlink(entry).startswith("/memfd:memory-backend-memfd"):
                descriptor = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
                try:
                    return mmap.mmap(descriptor, self._setup.size)
                finally:
                    os.close(descriptor)
        raise BenchError(f"{self._child.name} has no memfd")

    def _mismatches_anonymous(self) -> int:
        size, pattern = self._setup.size, self._setup.pages
        total = size // PAGE_SIZE
        start = guest_mapping(self.pid, size, shared=False).start
        wrong = 0
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            for first in range(0, total, TEMPLATE_PAGES):
                wanted = expected(first, min(TEMPLATE_PAGES, total - first), total, pattern)
                got = np.frombuffer(memory.read(wanted.nbytes), dtype=np.uint8).reshape(-1, PAGE_SIZE)
                wrong += differing(got, wanted) if got.shape == wanted.shape else len(wanted)
        return wrong

    async def command(self, name: str, arguments: JsonObject | None = None) -> Any:
        """The answer to a QMP command. BenchError if QEMU refuses the command.

        **Cancellation:** QEMU may have executed the command; kill it.
        """
        await self._child.send({"execute": name, "arguments": arguments or {}})
        while True:
            message = await self._child.receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise BenchError(f"{self._child.name}: {name}: {message['error']['desc']}")
            else:
                return message["return"]


async def open_qemu_side(nursery: trio.Nursery, role: str, setup: Setup) -> QemuSide:
    """Start a QEMU and prepare it.

    Raises:
        BenchError: QEMU did not start, or refused a setting.
    """
    assert setup.qemu is not None, "the caller leaves out the pairs with QEMU when there is none"
    kind = setup.kind(role)
    prealloc = kind.populated and not (role == "source" and setup.pages in UNTOUCHED)
    command = qemu_command(setup.qemu.command, setup.size, kind, incoming=role == "destination", prealloc=prealloc)
    child = await start_child(nursery, f"QEMU {role}", command, setup.qemu.environment)
    side = QemuSide(child, role, setup)
    await side.prepare()
    return side
