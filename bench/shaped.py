"""A network of a given rate between a source and a destination, made for a benchmark and removed at its end.

With the privileges for it: two network namespaces with a pair of veth devices between them, and ``tc`` with tbf at both
ends. A delay needs netem as well. Where the kernel lacks one of these, or the privileges are missing, a relay in a
process of its own limits the rate and delays (:mod:`bench.relay`); :attr:`Link.how` says which of the two it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import trio

from bench.child import JsonChild, start_python_child
from bench.errors import BenchError, first_error

#: The addresses of the two ends, in a network that only the two namespaces have.
_SOURCE: Final = "10.203.77.1"
_DESTINATION: Final = "10.203.77.2"
_BURST: Final = "256kb"
#: How long a packet waits at most in the queue of the shaped device.
_QUEUE: Final = "50ms"
_names: Final = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The rate and the delay of the network."""

    #: Bits per second, in each direction.
    bits_per_s: int
    #: Milliseconds, in each direction.
    delay_ms: float = 0.0

    def __str__(self) -> str:
        return f"{self.bits_per_s / 1e6:g} Mbit/s" + (f", {self.delay_ms:g} ms each way" if self.delay_ms else "")


class Link(Protocol):
    """The network between the two sides of one migration after the other."""

    @property
    def how(self) -> str:
        """What shapes the network, in one sentence."""

    @property
    def source(self) -> Sequence[str]:
        """The begin of the command line of a source."""

    @property
    def destination(self) -> Sequence[str]:
        """The begin of the command line of a destination."""

    @property
    def address(self) -> str:
        """Where a destination listens."""

    async def address_for_source(self, uri: str) -> str:
        """Where a source connects, for a destination that listens at *uri*."""

    async def sent(self) -> int:
        """Bytes that have gone to the destination so far, as the network counts them."""


class NamespaceLink:
    """Two network namespaces. A :class:`Link`."""

    def __init__(self, names: tuple[str, str], shape: Shape) -> None:
        self._names = names
        self.how = f"two network namespaces, {shape} by tc"
        self.source = ("ip", "netns", "exec", names[0])
        self.destination = ("ip", "netns", "exec", names[1])
        self.address = f"tcp:{_DESTINATION}:0"

    async def address_for_source(self, uri: str) -> str:
        """The address of the destination itself.

        **Cancellation:** no effect.
        """
        await trio.lowlevel.checkpoint()
        return uri

    async def sent(self) -> int:
        """The counter of the source's device, headers of packets included.

        **Cancellation:** no effect.
        """
        answer = await _command("ip", "-n", self._names[0], "-s", "-j", "link", "show", "dev", "veth0")
        return int(json.loads(answer)[0]["stats64"]["tx"]["bytes"])


class RelayLink:
    """A relay in a process of its own. A :class:`Link`.

    Args:
        nursery: the relays live until it is cancelled.
        why: why the kernel does not shape the network.
    """

    def __init__(self, nursery: trio.Nursery, shape: Shape, why: str) -> None:
        self._nursery = nursery
        self._shape = shape
        self._relay: JsonChild | None = None
        self.how = f"a relay over loopback, {shape}, because {why}"
        self.source: Sequence[str] = ()
        self.destination: Sequence[str] = ()
        self.address = "tcp:127.0.0.1:0"

    async def address_for_source(self, uri: str) -> str:
        """Start a relay to that destination, and return its address.

        **Cancellation:** the relay is killed with the nursery.
        """
        _, host, port = uri.split(":")
        arguments = [str(self._shape.bits_per_s / 8), str(self._shape.delay_ms / 1000), host, port]
        self._relay = await start_python_child(self._nursery, "relay", "bench.relay", arguments)
        return str(await self._relay.answer("listening"))

    async def sent(self) -> int:
        """What the present relay has passed on.

        **Cancellation:** no effect.
        """
        if self._relay is None:
            await trio.lowlevel.checkpoint()
            return 0
        await self._relay.send({"do": "sent"})
        return int(await self._relay.answer("sent"))


@contextlib.asynccontextmanager
async def open_link(shape: Shape, *, relay: bool = False) -> AsyncIterator[Link]:
    """A network of that shape; nothing of it is left at the end of the block.

    Args:
        relay: use a relay in any case.
    """
    why = "it was asked for"
    async with contextlib.AsyncExitStack() as stack:
        link: Link | None = None
        if not relay:
            try:
                link = await stack.enter_async_context(_namespaces(shape))
            except BenchError as exc:
                why = str(exc)
        if link is None:
            link = await stack.enter_async_context(_relayed(shape, why))
        yield link


@contextlib.asynccontextmanager
async def _relayed(shape: Shape, why: str) -> AsyncIterator[RelayLink]:
    try:
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            yield RelayLink(nursery, shape, why)
            nursery.cancel_scope.cancel("the relays are not needed any more")
    except* BenchError as group:
        raise first_error(group) from None


@contextlib.asynccontextmanager
async def _namespaces(shape: Shape) -> AsyncIterator[NamespaceLink]:
    """BenchError if this is not possible here."""
    number = next(_names)
    names = (f"trimig-bench-{os.getpid()}-{number}s", f"trimig-bench-{os.getpid()}-{number}d")
    made: list[str] = []
    try:
        for name in names:
            await _command("ip", "netns", "add", name)
            made.append(name)
        await _command(
            *("ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0"),
            *("netns", names[1]),
        )
        for name, address in zip(names, (_SOURCE, _DESTINATION), strict=True):
            await _command("ip", "-n", name, "address", "add", f"{address}/30", "dev", "veth0")
            await _command("ip", "-n", name, "link", "set", "lo", "up")
            await _command("ip", "-n", name, "link", "set", "veth0", "up")
            await _shape(name, shape)
        yield NamespaceLink(names, shape)
    finally:
        # Not by trio: a cancelled task must remove them as well. Each call takes milliseconds.
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)  # noqa: ASYNC221


async def _shape(name: str, shape: Shape) -> None:
    device = ("tc", "-n", name, "qdisc", "add", "dev", "veth0")
    await _command(
        *(*device, "root", "handle", "1:", "tbf", "rate", f"{shape.bits_per_s}bit", "burst", _BURST),
        *("latency", _QUEUE),
    )
    if shape.delay_ms:
        delay = f"{shape.delay_ms:g}ms"
        await _command(*device, "parent", "1:1", "handle", "10:", "netem", "delay", delay, "limit", "100000")


async def _command(*words: str) -> bytes:
    """The output of a command. BenchError if it fails."""
    try:
        done = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
    except OSError as exc:
        raise BenchError(f"{words[0]} cannot be started: {exc.strerror}") from exc
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BenchError(f"`{' '.join(words)}` failed: {said[-1] if said else 'it says nothing'}")
    return done.stdout
