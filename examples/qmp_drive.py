"""Drives a migration over QMP with QEMU's own Python client, and prints a transcript that can be compared.

    python examples/qmp_drive.py SOURCE DESTINATION     # QMP addresses: a path, or HOST:PORT
    python examples/qmp_drive.py                        # starts two `trimig run` of its own

The script knows nothing of trimig: it drives two QEMUs as well as two `trimig run`, unchanged. The source must be a
running guest; the destination must have been started with `-incoming defer` (`--incoming defer`). The script sets
capabilities, sends commands that must be refused, migrates to a sink and cancels that, migrates for good with a pause
before the switchover, and continues the migration (without a pause with `--no-pause`). It records the class of each
error, the members of `query-migrate` in each status, and the order of the events on both sides. Two programs that speak
the same protocol give the same transcript.

Needs `pip install qemu.qmp`.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient
from qemu.qmp.protocol import ConnectError

#: Bytes per second for the migration to cancel: any guest is larger than the bytes sent in that time.
SLOW = 100_000
#: Commands that must be refused without a migration under way; the argument is the URI of a sink.
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no-such-command", {}),
    ("migrate", {}),
    ("migrate", {"uri": "pigeon:1"}),
    ("migrate-continue", {"state": "pre-switchover"}),
    ("migrate-start-postcopy", {}),
    ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}),
    ("migrate-set-parameters", {"downtime-limit": 2_000_001}),
    ("migrate-set-parameters", {"downtime-limit": "soon"}),
    ("migrate-set-parameters", {"no-such-parameter": 1}),
    ("migrate-set-capabilities", {"capabilities": [{"capability": "no-such-capability", "state": True}]}),
)


class Side:
    """One program behind a QMP socket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = QMPClient(name)
        self.events: list[str] = []
        self.passes = 0
        self.stopped = False

    async def execute(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; underscores in names stand for dashes."""
        return await self.client.execute(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def refused(self, command: str, arguments: Mapping[str, Any]) -> str:
        """The class of the error answer to a command."""
        try:
            await self.client.execute(command, arguments)
        except ExecuteError as error:
            return error.error_class
        return "accepted"

    async def status(self) -> str:
        """Of the migration."""
        return str((await self.execute("query-migrate")).get("status", "none"))

    async def wait(self, *wanted: str) -> str:
        """Wait until the migration is in one of these statuses."""
        while (status := await self.status()) not in wanted:
            if status in ("completed", "failed", "cancelled"):
                raise RuntimeError(f"{self.name}: the migration is {status}, not {' or '.join(wanted)}")
            await asyncio.sleep(0.01)
        return status

    async def wait_run_state(self, wanted: str) -> None:
        """Wait until the guest is in that run state."""
        while True:
            if (await self.execute("query-status"))["status"] == wanted:
                return
            await asyncio.sleep(0.01)

    async def members(self) -> str:
        """The names that ``query-migrate`` has now, sorted."""
        info = await self.execute("query-migrate")
        names = set(info) | {f"ram.{name}" for name in info.get("ram", {})}
        return f"{info.get('status', 'none')}: {' '.join(sorted(names)) or '-'}"

    async def listen(self, listener: EventListener) -> None:
        """Record events. Of the passes only the first, and that of the stopped guest: others depend on the host."""
        async for event in listener:
            name = str(event["event"])
            data = event.get("data", {})
            word = f"{name} {data['status']}" if isinstance(data, dict) and "status" in data else name
            if word == "MIGRATION setup":
                self.passes = 0
                self.stopped = False
            self.stopped = self.stopped or name == "STOP"
            self.passes += name == "MIGRATION_PASS"
            if name != "MIGRATION_PASS" or self.passes == 1 or self.stopped:
                self.events.append(word)


def say(kind: str, side: Side, text: str) -> None:
    """One line of the transcript."""
    print(f"{kind:8} {side.name:11} {text}")


def say_events(*sides: Side) -> None:
    """The events since the last call, in the order of each side."""
    for side in sides:
        for event in side.events:
            say("event", side, event)
        side.events.clear()


@contextlib.asynccontextmanager
async def connected(side: Side, address: str) -> AsyncIterator[None]:
    """Connect *side*, and record its events meanwhile."""
    host, colon, port = address.rpartition(":")
    target: Any = (host, int(port)) if colon and port.isdigit() else address.removeprefix("unix:")
    for attempt in range(200):  # the program may have been started a moment ago
        try:
            await side.client.connect(target)
            break
        except ConnectError:
            if attempt == 199:
                raise
            await asyncio.sleep(0.05)
    try:
        with side.client.listener() as listener:
            listening = asyncio.create_task(side.listen(listener))
            try:
                yield
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    finally:
        await side.client.disconnect()


@contextlib.asynccontextmanager
async def sink() -> AsyncIterator[str]:
    """A sink that takes a migration and never answers; yields its URI."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1 << 16):
                pass
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def settled(*sides: Side) -> None:
    """Events come before the answer to a later command, so after one command all earlier events have come."""
    for side in sides:
        await side.execute("query-status")
    await asyncio.sleep(0.05)  # the listener's own task records them


async def refusals(side: Side) -> None:
    """Send the commands that must be refused without a migration under way."""
    for command, arguments in REFUSED:
        words = " ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "capabilities")
        say("error", side, f"{command}{words and ' '}{words}: {await side.refused(command, arguments)}")


async def drive(source: Side, destination: Side, *, pause: bool) -> None:
    """The whole story."""
    on = {"events": True, "return-path": True, "pause-before-switchover": pause, "postcopy-ram": False}
    for side in (source, destination):
        say("members", side, await side.members())
        await side.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": state} for name, state in on.items()],
        )
    await source.execute("migrate_cancel")  # has no effect without a migration
    await refusals(source)
    say("error", destination, f"migrate: {await destination.refused('migrate', {'uri': 'tcp:127.0.0.1:1'})}")
    say("members", source, await source.members())

    # The first migration goes to a sink, slowly, and is cancelled.
    await source.execute("migrate-set-parameters", max_bandwidth=SLOW)
    async with sink() as uri:
        await source.execute("migrate", uri=uri)
        await source.wait("active")
        say("members", source, await source.members())
        say("error", source, f"migrate: {await source.refused('migrate', {'uri': uri})}")
        off = {"capabilities": [{"capability": "return-path", "state": False}]}
        say("error", source, f"migrate-set-capabilities: {await source.refused('migrate-set-capabilities', off)}")
        await source.execute("migrate-set-parameters", downtime_limit=100)
        await source.execute("migrate_cancel")
        await source.wait("cancelled")
        await source.wait_run_state("running")
    say("members", source, await source.members())
    await settled(source)
    say_events(source)

    # The second migration completes.
    await source.execute("migrate-set-parameters", max_bandwidth=0, downtime_limit=300)
    await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    say("members", destination, await destination.members())
    say(
        "error",
        destination,
        "migrate-incoming again: " + await destination.refused("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}),
    )
    await source.execute("migrate", uri=await address_of(destination))
    if pause:
        await source.wait("pre-switchover")
        say("members", source, await source.members())
        await source.execute("migrate-continue", state="pre-switchover")
    await source.wait("completed")
    await destination.wait("completed")
    await destination.wait_run_state("running")
    for side in (source, destination):
        say("members", side, await side.members())
        say("state", side, str((await side.execute("query-status"))["status"]))
    await settled(source, destination)
    say_events(source, destination)


async def address_of(side: Side) -> str:
    """The address that the destination listens at, with the port that the kernel chose."""
    address = (await side.execute("query-migrate"))["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


@contextlib.asynccontextmanager
async def hosts() -> AsyncIterator[tuple[str, str]]:
    """Two `trimig run`: a source with a guest, and a destination."""
    with tempfile.TemporaryDirectory(prefix="qmp-drive-") as directory:
        addresses = (f"{directory}/source", f"{directory}/destination")
        command = [sys.executable, "-m", "trimig", "run", "--guest", "process:size=16M,dirty-rate=1M,hot=1M"]
        processes = [
            await asyncio.create_subprocess_exec(
                *command,
                *more,
                "--qmp",
                f"unix:{address}",
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            for address, more in zip(addresses, ((), ("--incoming", "defer")), strict=True)
        ]
        try:
            yield addresses
        finally:
            for process in processes:
                if process.returncode is None:
                    process.terminate()
            for process in processes:
                await process.wait()


async def main(addresses: tuple[str, str] | None, *, pause: bool) -> None:
    """Connect both, and print the transcript."""
    async with contextlib.AsyncExitStack() as stack:
        source, destination = Side("source"), Side("destination")
        found = await stack.enter_async_context(hosts()) if addresses is None else addresses
        for side, address in zip((source, destination), found, strict=True):
            await stack.enter_async_context(connected(side, address))
        async with asyncio.timeout(40):
            await drive(source, destination, pause=pause)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Drive a migration over QMP, and print a transcript.")
    parser.add_argument("addresses", nargs="*", metavar="ADDRESS", help="QMP of the source, and of the destination")
    parser.add_argument("--no-pause", action="store_true", help="without a pause before the switchover")
    given = parser.parse_args()
    if len(given.addresses) not in (0, 2):
        parser.error("give both addresses, or none")
    asyncio.run(main(tuple(given.addresses) or None, pause=not given.no_pause))
