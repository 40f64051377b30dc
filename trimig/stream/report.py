"""The report on a stream: the records that :func:`trimig.stream.inspect_stream` returns, and their JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RemoteProtocolError
from ..wire.refusals import Unsupported

if TYPE_CHECKING:
    from ..errors import TrimigError
    from ..guest import ConfigSubsection
    from ..wire.devices.decoding import Node


@dataclasses.dataclass(slots=True, kw_only=True)
class SectionInfo:
    """One section. Offsets and sizes in bytes; the size includes header and footer, and is None if the end is missing."""

    kind: str
    section_id: int
    idstr: str
    instance_id: int
    version_id: int
    offset: int
    size: int | None = None
    #: RAM sections: PAGE and ZERO records in it.
    pages: int = 0
    zero_pages: int = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class BlockInfo:
    """One RAM block, and the records of its pages; a page that was sent twice counts twice."""

    name: str
    length: int
    pages: int = 0
    zero_pages: int = 0
    #: Pages that are not in the stream; None if the stream could not be read to the end of its RAM.
    missing: int | None = None
    #: Pages that are not in the stream because a virtio-mem device has not plugged them in; they are not missing.
    unplugged: int = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class CommandInfo:
    """One command."""

    number: int
    name: str
    payload: bytes
    offset: int


@dataclasses.dataclass(slots=True, kw_only=True)
class DeviceInfo:
    """The state of one device."""

    idstr: str
    instance_id: int
    section_id: int
    version_id: int
    #: Offset of the section, and size and bytes of its payload.
    offset: int
    size: int
    payload: bytes
    #: The fields, decoded by the description; None if decoding is not possible.
    fields: tuple[Node, ...] | None = None
    #: The reason why decoding is not possible.
    problem: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class StreamReport:
    """The report on one stream: a record that the reader of the stream writes. ``error`` is None for a sound stream."""

    #: Bytes read, and the offset after the last byte that was decoded.
    size: int = 0
    good: int = 0
    version: int | None = None
    machine: str | None = None
    subsections: Sequence[ConfigSubsection] = ()
    #: Whether the stream has a configuration section, and footers.
    configuration: bool = True
    footers: bool = True
    sections: list[SectionInfo] = dataclasses.field(default_factory=list)
    commands: list[CommandInfo] = dataclasses.field(default_factory=list)
    #: Number of sections and commands that are not listed, because there are too many.
    unlisted: int = 0
    blocks: list[BlockInfo] = dataclasses.field(default_factory=list)
    devices: list[DeviceInfo] = dataclasses.field(default_factory=list)
    #: The run state in ``globalstate``.
    run_state: str | None = None
    #: Offset of the end-of-file byte, or None.
    eof_offset: int | None = None
    #: The text of the description; None if there is none.
    description: bytes | None = None
    #: Number of bytes after the end.
    trailing: int = 0
    #: Irregularities that are not damage.
    problems: list[str] = dataclasses.field(default_factory=list)
    error: TrimigError | None = None

    @property
    def sound(self) -> bool:
        """Whether the stream is whole and without damage."""
        return self.error is None

    @property
    def damaged(self) -> bool:
        """Whether the stream is damaged; False if it only has content that trimig does not read."""
        return self.error is not None and not isinstance(self.error, Unsupported)

    def record(self) -> dict[str, Any]:
        """The report as JSON: bytes in hexadecimal."""
        error = self.error
        return {
            "sound": self.sound,
            "damaged": self.damaged,
            "size": self.size,
            "good": self.good,
            "version": self.version,
            "configuration": {
                "machine": self.machine,
                "subsections": [
                    {"name": s.name, "version": s.version, "payload": s.payload.hex()} for s in self.subsections
                ],
            }
            if self.machine is not None
            else None,
            "footers": self.footers,
            "run_state": self.run_state,
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "sections": [dataclasses.asdict(section) for section in self.sections],
            "commands": [dataclasses.asdict(c) | {"payload": c.payload.hex()} for c in self.commands],
            "unlisted": self.unlisted,
            "devices": [_device_record(device) for device in self.devices],
            "eof_offset": self.eof_offset,
            "description": None if self.description is None else {"size": len(self.description)},
            "trailing": self.trailing,
            "problems": self.problems,
            "error": None
            if error is None
            else {
                "kind": type(error).__name__,
                "message": str(error),
                "offset": error.offset if isinstance(error, RemoteProtocolError) else None,
                "section": error.section if isinstance(error, RemoteProtocolError) else None,
            },
        }


def _device_record(device: DeviceInfo) -> dict[str, Any]:
    return {
        "idstr": device.idstr,
        "instance_id": device.instance_id,
        "section_id": device.section_id,
        "version_id": device.version_id,
        "offset": device.offset,
        "size": device.size,
        "payload": device.payload.hex(),
        "fields": None if device.fields is None else [node_record(node) for node in device.fields],
        "problem": device.problem,
    }


def node_record(node: Node) -> dict[str, Any]:
    """One field as JSON: with ``value``, ``raw`` (hexadecimal) or ``children``."""
    record: dict[str, Any] = {"name": node.name, "type": node.type, "offset": node.offset, "size": node.size}
    for name in ("index", "vmsd_name", "version"):
        if (value := getattr(node, name)) is not None:
            record[name] = value
    if node.children:
        record["children"] = [node_record(child) for child in node.children]
    elif node.value is not None:
        record["value"] = node.value
    else:
        record["raw"] = node.raw.hex()
    return record
