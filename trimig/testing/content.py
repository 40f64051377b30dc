"""The content of a guest at one moment, memory and devices, to be compared with that of another guest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..engine.guest_calls import guarded
from ..errors import MigrationError

if TYPE_CHECKING:
    from ..guest import Guest, Pages


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A copy of a guest's memory and devices."""

    #: By the names of the blocks.
    ram: Mapping[str, Pages]
    #: Payloads by (idstr, instance id), or the error of a device that could not be saved; None for a guest without
    #: devices of its own.
    devices: Mapping[tuple[str, int], bytes | str] | None


def content_of(guest: Guest) -> Content:
    """A copy of what *guest* has now."""
    devices: dict[tuple[str, int], bytes | str] = {}
    for key, device in (guest.devices or {}).items():
        try:
            with guarded("saving it once more, to compare it,"):
                devices[key] = bytes(device.save())
        except MigrationError as error:
            devices[key] = str(error)
    return Content(
        ram={block.name: block.pages.copy() for block in guest.ram},
        devices=None if guest.devices is None else devices,
    )


def differences(given: Content, found: Content) -> list[str]:
    """How *found* differs from *given*, in clauses; blocks and devices that only one of the two has are not compared."""
    clauses = []
    for name in given.ram.keys() & found.ram.keys():
        mine, other = given.ram[name], found.ram[name]
        if mine.shape != other.shape or np.array_equal(mine, other):
            continue
        pages = np.flatnonzero((mine != other).any(axis=1))
        clauses.append(
            f"{len(pages)} pages of RAM block {name!r} are not as they were when the guest was handed over, first page {pages[0]}"
        )
    for key in (given.devices or {}).keys() & (found.devices or {}).keys():
        mine_saved, other_saved = (given.devices or {})[key], (found.devices or {})[key]
        if mine_saved != other_saved:
            clauses.append(f"device {key[0]!r} {key[1]} was {_shown(mine_saved)} and is {_shown(other_saved)}")
    return sorted(clauses)


def _shown(saved: bytes | str) -> str:
    if isinstance(saved, str):
        return saved
    return saved[:16].hex() + ("…" if len(saved) > 16 else "")
