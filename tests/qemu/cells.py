"""The cells of the matrix: a version of QEMU, a machine type, a direction, and a mode of migration."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Final

from tests.qemu.pairs import by_pairs

#: ``pc`` is the newest one of the version; ``none`` has only RAM.
MACHINES: Final = ("pc", "pc-i440fx-7.2", "none")
#: To QEMU; from QEMU, to be parked; and from QEMU through trimig to the next version with the machine type.
DIRECTIONS: Final = ("to", "from", "through")
#: The modes, each with a short description.
MODES: Final = {
    "precopy": "over TCP, with a return path",
    "one-way": "without a return path",
    "postcopy": "the guest goes first, its memory follows",
    "preempt": "postcopy with a second connection for the pages that are asked for",
    "recovery": "postcopy that is interrupted twice",
    "tls": "with certificates on both sides",
    "unix": "over a unix socket",
    "exec": "through a command",
    "fd": "through a descriptor",
    "file": "through a file",
    "pause": "held by the source before the switchover",
    "again": "cancelled at the source, and then begun again",
    "channels": "the address as the list of channels that QEMU has from 8.2 on",
    "uuid": "with validate-uuid",
    "ack": "with switchover-ack",
    "snapshot": "a background snapshot",
}
#: The first version that has a mode.
SINCE: Final = {"channels": (8, 2), "ack": (8, 1), "preempt": (7, 1), "snapshot": (6, 0)}


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One cell. *machine* is one of :data:`MACHINES`, *direction* of :data:`DIRECTIONS`, *mode* of :data:`MODES`."""

    version: str
    machine: str
    direction: str
    mode: str

    def __str__(self) -> str:
        return f"{self.version}-{self.machine}-{self.direction}-{self.mode}"

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version as numbers."""
        return tuple(int(part) for part in self.version.split("."))


def impossible(cell: Cell) -> str | None:
    """The reason why such a migration is impossible, or None."""
    since = SINCE.get(cell.mode)
    if since is not None and cell.numbers < since:
        return f"QEMU {cell.version} does not know {MODES[cell.mode]}: {since[0]}.{since[1]} is the first"
    if cell.mode == "snapshot" and cell.direction == "to":
        return "trimig makes no background snapshots"
    return None


def every(versions: Sequence[str]) -> list[Cell]:
    """All cells, including the impossible ones."""
    return [Cell(*values) for values in itertools.product(versions, MACHINES, DIRECTIONS, MODES)]


def chosen(versions: Sequence[str]) -> set[Cell]:
    """Cells in which each value occurs together with each other value, where that is possible."""
    possible = [dataclasses.astuple(cell) for cell in every(versions) if impossible(cell) is None]
    return {Cell(*values) for values in by_pairs(possible)}
