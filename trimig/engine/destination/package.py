"""Parses the package of a switch to postcopy at the destination. All of it is parsed before a part is carried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...errors import RemoteProtocolError
from ...guest import DeviceSection
from ...status import Item, Stream, after
from ...wire import events as ev
from ...wire.commands import HEAD
from ...wire.constants import Command, Section
from ...wire.decoder import Decoder
from .. import device_tail
from ..order import item_of, item_of_command
from .section import section_of

if TYPE_CHECKING:
    from ...wire.measure import Measure

_LISTEN: Final = bytes((Section.COMMAND, 0, Command.POSTCOPY_LISTEN, 0, 0))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """The contents of the package: the device sections in their order, and the values of the PINGs."""

    sections: Sequence[DeviceSection]
    pings: Sequence[int]


async def parse_package(
    package: ev.PackageElement, decoder: Decoder, measure: Measure | None, *, footers: bool
) -> Package:
    """Parse a package: LISTEN, device sections and PINGs, RUN.

    Args:
        decoder: the decoder of the stream that has brought the package.
        measure: finds the ends of device payloads; None for a guest whose devices are unknown.

    Raises:
        RemoteProtocolError: the package has another content or order.

    **Cancellation:** no effect.
    """
    if package.data[: len(_LISTEN)] != _LISTEN:
        raise RemoteProtocolError("the package does not begin with LISTEN", offset=package.at, section="package")
    rest = package.data[len(_LISTEN) :]
    at = package.at + len(_LISTEN)
    if measure is None:
        split = await device_tail.split_package(rest, at, footers=footers)
        sections: Sequence[DeviceSection] = split.sections
        commands = [(number, payload, where) for number, payload, where in split.commands]
    else:
        sections, commands = _decode(rest, at, decoder, measure, footers=footers)
    _check_order(commands, package)
    pings = [int.from_bytes(payload) for number, payload, _ in commands if number == Command.PING]
    return Package(sections=sections, pings=pings)


def _check_order(commands: Sequence[tuple[int, bytes, int]], package: ev.PackageElement) -> None:
    """Check that the commands of a package are legal in their order, with RUN at the end. RemoteProtocolError."""
    state = after(Stream.PACKAGE, Item.POSTCOPY_LISTEN)
    end = package.at + len(package.data)
    for number, payload, where in commands:
        state = after(state, item_of_command(number, where), offset=where, section="package")
        if state is Stream.FOLLOWING and where + HEAD + len(payload) != end:
            raise RemoteProtocolError(
                "the package goes on behind RUN", offset=where + HEAD + len(payload), section="package"
            )
    if state is not Stream.FOLLOWING:
        raise RemoteProtocolError("the package does not end with RUN", offset=package.at, section="package")


def _decode(
    data: bytes, at: int, decoder: Decoder, measure: Measure, *, footers: bool
) -> tuple[list[DeviceSection], list[tuple[int, bytes, int]]]:
    inner = Decoder(measure=measure, footers=footers, continues=decoder, buffer_bytes=max(len(data), 1))
    inner.feed(data)
    sections: list[DeviceSection] = []
    commands: list[tuple[int, bytes, int]] = []
    while (event := inner.next_event()) is not None:
        after(Stream.LISTENING, item_of(event), offset=at + event.at, section="package")
        match event:
            case ev.SectionHeader():
                payload = inner.next_event()
                if not isinstance(payload, ev.DevicePayload):
                    break  # the section is incomplete
                sections.append(section_of(event, payload))
            case ev.CommandElement():
                commands.append((event.number, event.payload, at + event.at))
    if inner.offset != len(data):
        raise RemoteProtocolError(
            f"the package ends inside an element, {len(data) - inner.offset} bytes of it are there",
            offset=at + inner.offset,
            section=inner.section or "package",
        )
    return sections, commands
