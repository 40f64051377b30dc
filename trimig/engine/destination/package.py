"""The package of a switch to postcopy on the destination: it is taken apart before any of it is acted on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...errors import RemoteProtocolError
from ...guest import DeviceSection
from ...wire import events as ev
from ...wire.constants import Command, Section
from ...wire.decoder import Decoder
from ...wire.refusals import command_name
from .. import device_tail
from ..order import Place, check_place

if TYPE_CHECKING:
    from ...wire.measure import Measure

_LISTEN: Final = bytes((Section.COMMAND, 0, Command.POSTCOPY_LISTEN, 0, 0))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What was in the package: the devices in their order, and the values of the PINGs."""

    sections: Sequence[DeviceSection]
    pings: Sequence[int]


async def take_apart(
    package: ev.PackageElement, decoder: Decoder, measure: Measure | None, *, footers: bool
) -> Package:
    """Read a package: LISTEN, device sections and PINGs, RUN.

    Args:
        decoder: of the stream that the package came in.
        measure: delimits device payloads; None for a guest whose devices are unknown.

    Raises:
        RemoteProtocolError: it is anything else.

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
    if not commands or commands[-1][0] != Command.POSTCOPY_RUN:
        raise RemoteProtocolError("the package does not end with RUN", offset=package.at, section="package")
    for number, _, where in commands[:-1]:
        check_place(number, Place.PACKAGE, where, "package")
        if number in (Command.POSTCOPY_LISTEN, Command.POSTCOPY_RUN):
            raise RemoteProtocolError(
                f"command {command_name(number)} in the middle of a package", offset=where, section="package"
            )
    pings = [int.from_bytes(payload) for number, payload, _ in commands if number == Command.PING]
    return Package(sections=sections, pings=pings)


def _decode(
    data: bytes, at: int, decoder: Decoder, measure: Measure, *, footers: bool
) -> tuple[list[DeviceSection], list[tuple[int, bytes, int]]]:
    inner = Decoder(measure=measure, footers=footers, continues=decoder, buffer_bytes=max(len(data), 1))
    inner.feed(data)
    sections: list[DeviceSection] = []
    commands: list[tuple[int, bytes, int]] = []
    header: ev.SectionHeader | None = None
    while (event := inner.next_event()) is not None:
        if commands and commands[-1][0] == Command.POSTCOPY_RUN:
            raise RemoteProtocolError("the package goes on behind RUN", offset=at + event.at, section="package")
        match event:
            case ev.SectionHeader(kind=Section.FULL):
                header = event
            case ev.DevicePayload():
                assert header is not None
                sections.append(
                    DeviceSection(
                        idstr=header.idstr,
                        instance_id=header.instance_id,
                        version_id=header.version_id,
                        payload=event.payload,
                        section_id=header.section_id,
                    )
                )
            case ev.CommandElement():
                commands.append((event.number, event.payload, at + event.at))
            case ev.SectionFooter():
                pass
            case _:
                raise RemoteProtocolError(
                    f"{type(event).__name__} in a package", offset=at + event.at, section="package"
                )
    if inner.offset != len(data):
        raise RemoteProtocolError(
            f"the package ends inside an element, {len(data) - inner.offset} bytes of it are there",
            offset=at + inner.offset,
            section=inner.section or "package",
        )
    return sections, commands
