"""Machines without sockets for their clients: commands are calls, and answers and events are recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from trimig import Config, transport
from trimig.guest import PAGE_SIZE
from trimig.qmp import CommandFailed, Machine
from trimig.status import TERMINAL, Status
from trimig.testing import ScriptedGuest

LIMIT = 30


class Talk:
    """One machine and its only client. Implements :class:`trimig.qmp.Session`."""

    def __init__(self, machine: Machine, guest: ScriptedGuest, nursery: trio.Nursery) -> None:
        self.machine = machine
        self.guest = guest
        self.nursery = nursery
        self.fds: deque[int] = deque()
        self.afterwards: list[Callable[[], None]] = []
        self.events: list[dict[str, Any]] = []
        machine.subscribe(lambda event: self.events.append(dict(event)))

    def take_fd(self) -> int | None:
        return self.fds.popleft() if self.fds else None

    def when_answered(self, call: Callable[[], None]) -> None:
        self.afterwards.append(call)

    async def say(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Execute a command; the value that a client would get as ``return``."""
        return await self.machine.execute(name, arguments or {}, self)

    async def refused(self, name: str, arguments: Mapping[str, Any] | None = None) -> str:
        """The sentence of the refusal of a command."""
        with pytest.raises(CommandFailed) as caught:
            await self.say(name, arguments)
        assert caught.value.error_class == "GenericError"
        return caught.value.desc

    async def capabilities(self, **states: bool) -> None:
        rows = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        await self.say("migrate-set-capabilities", {"capabilities": rows})

    async def state(self) -> str:
        """Of ``query-status``."""
        found = await self.say("query-status")
        assert found["running"] == (found["status"] == "running")
        return str(found["status"])

    async def query(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.say("query-migrate")
        return found

    async def until(self, status: Status, *, incoming: bool = False) -> None:
        monitor = self.machine.incoming if incoming else self.machine.outgoing
        while monitor.status is not status:
            assert monitor.status not in TERMINAL or monitor.status is Status.UNCERTAIN, (monitor, monitor.info())
            await monitor.wait_changed()

    async def over(self) -> Status:
        """Wait for the end of the running jobs and of their consequences; the outgoing status."""
        await self.machine._jobs.wait()
        return self.machine.outgoing.status

    def names(self) -> list[str]:
        """The events so far, a MIGRATION by its status."""
        return [e["data"]["status"] if e["event"] == "MIGRATION" else e["event"] for e in self.events]


@asynccontextmanager
async def hosted(
    guest: ScriptedGuest | None = None, config: Config | None = None, **options: Any
) -> AsyncIterator[Talk]:
    """A machine around *guest* (a small one by default)."""
    guest = guest or ScriptedGuest(run_state="inmigrate" if options.get("waiting") else "running")
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            machine = Machine(guest, nursery, config, **options)
            try:
                yield Talk(machine, guest, nursery)
            finally:
                machine.close()
                nursery.cancel_scope.cancel("the test is over")


@asynccontextmanager
async def pair(
    tmp_path: Path,
    guest: ScriptedGuest | None = None,
    other: ScriptedGuest | None = None,
    config: Config | None = None,
) -> AsyncIterator[tuple[Talk, Talk, str]]:
    """A running guest, a machine that waits for it, and the address of that machine."""
    uri = f"unix:{tmp_path}/migration"
    guest = guest or ScriptedGuest()
    if other is None:
        blocks = {block.name: block.length // PAGE_SIZE for block in guest.ram}
        other = ScriptedGuest(blocks=blocks, content="zero", run_state="inmigrate")
    async with hosted(guest, config) as source, hosted(other, waiting=True) as destination:
        await source.capabilities(events=True)
        await destination.capabilities(events=True)
        await destination.say("migrate-incoming", {"uri": uri})
        yield source, destination, uri


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection attempt wait for ever."""

    async def connect(uri: str, config: Config) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(transport, "connect", connect)
