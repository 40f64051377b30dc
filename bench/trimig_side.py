"""One side of a migration by trimig, with its run loop measured. Run by :mod:`bench.sides`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Literal

import trio

import trimig
import trimig.guests
from bench.errors import BenchError
from bench.measure import SliceInstrument
from bench.memory import MEMORY_KINDS, Pages, fill_in_fork, mismatches, populate
from bench.qemu import MACHINE, RAM_BLOCK
from trimig.config import TlsX509


def add_machine(guest: trimig.AppGuest, size: int) -> Pages:
    """Make *guest* look like a ``-M none`` QEMU, so that each accepts the other; returns its memory."""
    block = guest.add_ram(RAM_BLOCK, size)
    guest.add_device(trimig.guests.TimerState())
    return block.pages


def make_config(
    tls: str | None = None,
    *,
    return_path: bool = True,
    capabilities: Sequence[str] = (),
    parameters: Sequence[str] = (),
    choose: bool = False,
) -> trimig.Config:
    """No rate limit, otherwise the defaults; with the credentials in the directory *tls*, if any.

    Args:
        capabilities: names of capabilities to turn on.
        parameters: each ``NAME=VALUE``.
        choose: the source chooses the encoding of each batch.
    """
    ours = trimig.Parameters(max_bandwidth=0, tls_creds="tls0" if tls else "", tls_hostname="localhost" if tls else "")
    objects = (TlsX509(id="tls0", dir=tls),) if tls else ()
    config = trimig.Config(parameters=ours, capabilities=trimig.Capabilities(return_path=return_path), objects=objects)
    encoding: Literal["auto", "off"] = "auto" if choose else "off"
    return dataclasses.replace(config.with_options(capabilities, parameters), encoding=encoding)


def config_of(command: Mapping[str, Any]) -> trimig.Config:
    """The configuration that a command of the coordinator describes."""
    return make_config(
        command.get("tls"),
        return_path=command.get("return_path", True),
        capabilities=command.get("capabilities", ()),
        parameters=command.get("parameters", ()),
        choose=command.get("choose", False),
    )


async def wait_address(events: AsyncIterator[trimig.Event]) -> str:
    """The URI of a destination that is being started; *events* was opened before the start.

    Not ``monitor.addresses``: some transports get their peer at once, and may not listen any more at a later look.
    """
    async for event in events:
        if event.name == "LISTENING":
            return str(event.data["addresses"][0])
    raise BenchError("it ended before it listened")


class TrimigSide:
    """Answers the coordinator's commands. Made before the event loop starts, because it may fork."""

    def __init__(self, role: str, size: int, kind: str, pattern: str) -> None:
        self._role = role
        self._size = size
        self._populated = MEMORY_KINDS[kind].populated
        self._pattern = pattern
        self._summary: trimig.Summary | None = None
        #: Of the present destination.
        self._listening = trio.CancelScope()
        self._make_guest()
        if role == "source":
            fill_in_fork(self._pages, pattern)
        self._instrument = SliceInstrument()

    async def serve(self) -> None:
        """Answer commands until the coordinator is gone."""
        async with trio.open_nursery() as nursery:
            async for command in commands():
                match command["do"]:
                    case "listen":
                        nursery.start_soon(self._listen, command)
                    case "stop":
                        self._listening.cancel()
                    case "migrate":
                        await self._watch(trimig.migrate(self._guest, command["uri"], config_of(command)))
                    case "report":
                        say(report=self._report())
                    case "verify":
                        say(mismatches=mismatches(self._pages, self._pattern))
            nursery.cancel_scope.cancel()

    async def _listen(self, command: Mapping[str, Any]) -> None:
        """Be the destination of one migration; it ends with exactly one answer."""
        if self._summary is not None:
            self._make_guest()  # the last guest was handed over and runs
        monitor = trimig.Monitor()
        with trio.CancelScope() as self._listening:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(announce, monitor.events())
                uri = command.get("at", "tcp:127.0.0.1:0")
                await self._watch(trimig.receive(self._guest, uri, config_of(command), monitor=monitor))
                nursery.cancel_scope.cancel()
        if self._listening.cancelled_caught:
            say(failed="it was told to stop")

    def _make_guest(self) -> None:
        kind = trimig.LazyAppGuest if self._role == "lazy" else trimig.AppGuest
        self._guest = kind(MACHINE, running=self._role == "source")
        self._pages = add_machine(self._guest, self._size)
        self._summary = None
        if self._role == "destination" and self._populated:
            populate(self._pages)

    async def _watch(self, migration: Awaitable[trimig.Summary]) -> None:
        """Run the migration with the instrument on, and report its end; the figures are computed on request."""
        trio.lowlevel.add_instrument(self._instrument)
        try:
            self._summary = await migration
        except trimig.TrimigError as exc:
            say(failed=f"{type(exc).__name__}: {exc}")
        else:
            say(finished=True)
        finally:
            trio.lowlevel.remove_instrument(self._instrument)

    def _report(self) -> dict[str, Any]:
        slices = self._instrument.slices()
        report: dict[str, Any] = {"slices": None if slices is None else dataclasses.asdict(slices)}
        if self._summary is not None:
            downtime = self._summary.downtime
            report["downtime_ms"] = None if downtime is None else downtime * 1000
            report["total_ms"] = self._summary.total_time * 1000
        return report


async def commands() -> AsyncIterator[dict[str, Any]]:
    """The coordinator's commands, one JSON object a line."""
    buffer = b""
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stream:
        while data := await stream.receive_some():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                yield json.loads(line)


async def announce(events: AsyncIterator[trimig.Event]) -> None:
    """Tell the coordinator the address of the destination; *events* was opened before its start."""
    say(listening=await wait_address(events))


def say(**message: object) -> None:
    """Answer the coordinator. The write is a short line into a pipe that the coordinator reads: it does not block."""
    print(json.dumps(message), flush=True)


def main() -> None:
    role, size, kind, pattern = sys.argv[1:]
    side = TrimigSide(role, int(size), kind, pattern)
    say(ready=True)
    trio.run(side.serve)


if __name__ == "__main__":
    main()
