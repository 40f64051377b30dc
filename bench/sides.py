"""The two ends of a measured migration, for the coordinator.

A side is a process of its own. The coordinator prepares it first (guest memory allocated, the source's filled); only
then does the interval begin, with :meth:`Side.begin` on the source.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import trio

from bench.child import JsonChild, start_python_child
from bench.measure import Slices
from bench.memory import SOURCE_KIND, MemoryKind
from bench.programs import QemuProgram
from bench.ways import TCP, Way


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The settings for both sides of one measurement."""

    size: int
    memory: MemoryKind
    pages: str
    qemu: QemuProgram | None = None
    way: Way = TCP
    #: For the sockets of the way.
    directory: str = ""

    def kind(self, role: str) -> MemoryKind:
        """The kind of the RAM of that role; :mod:`bench.memory` says why the source's is always the same."""
        return SOURCE_KIND if role == "source" else self.memory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The report of a side about a finished migration; None for unknown values."""

    downtime_ms: float | None = None
    total_ms: float | None = None
    slices: Slices | None = None


class Side(abc.ABC):
    """One end. The coordinator calls each method once, in the order of this class."""

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """The measured process."""

    @abc.abstractmethod
    async def listen(self) -> str:
        """Destination: wait for a migration on the address of the way, and return its URI."""

    @abc.abstractmethod
    async def begin(self, uri: str) -> None:
        """Source: begin. Returns when the command is written, before the migration is done."""

    @abc.abstractmethod
    async def finished(self) -> None:
        """Wait until this side reports that the migration is complete.

        Raises:
            BenchError: the migration failed; the message says why.
        """

    @abc.abstractmethod
    async def report(self) -> Report:
        """The figures that the side reports."""

    @abc.abstractmethod
    async def mismatches(self) -> int:
        """Destination: the number of pages that differ from the source's."""


class PythonSide(Side):
    """A child that runs :mod:`bench.raw_side` or :mod:`bench.trimig_side`."""

    def __init__(self, child: JsonChild, setup: Setup) -> None:
        self._child = child
        self._at = setup.way.address(setup.directory)
        way = setup.way
        self._options = {"capabilities": way.capabilities, "parameters": way.parameter_options(), "choose": way.choose}

    @property
    def pid(self) -> int:
        return self._child.pid

    async def listen(self, **how: Any) -> str:
        return str(await self._ask("listening", **{"do": "listen", "at": self._at, **self._options, **how}))

    async def begin(self, uri: str, **how: Any) -> None:
        await self._child.send({"do": "migrate", "uri": uri, **self._options, **how})

    async def finished(self) -> None:
        await self._child.answer("finished")

    async def report(self) -> Report:
        values = await self._ask("report", do="report")
        slices = values.get("slices")
        return Report(
            downtime_ms=values.get("downtime_ms"),
            total_ms=values.get("total_ms"),
            slices=None if slices is None else Slices(**slices),
        )

    async def mismatches(self) -> int:
        return int(await self._ask("mismatches", do="verify"))

    async def _ask(self, wanted: str, **message: Any) -> Any:
        await self._child.send(message)
        return await self._child.answer(wanted)


async def open_python_side(nursery: trio.Nursery, engine: str, role: str, setup: Setup) -> PythonSide:
    """Start a ``raw`` or ``trimig`` side and wait until its memory is allocated (and filled, at the source).

    Raises:
        BenchError: the side did not start.
    """
    arguments = [role, str(setup.size), setup.kind(role).name, setup.pages]
    child = await start_python_child(nursery, f"{engine} {role}", f"bench.{engine}_side", arguments)
    await child.answer("ready")
    return PythonSide(child, setup)
