"""Decoding and measuring device state by its description (vmstate.md part 7).

Every number in a description is checked against the payload, and the number of fields and elements that are examined is
bounded by the bytes of the payload. A walk can be made in pieces, so that a large one does not block other work.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, TypeVar

from ...errors import RemoteProtocolError
from ..constants import MAX_CSTR, Section
from .description import bad, key_of, section_name, short
from .vmstate import SCALARS

#: The number of fields and elements that may be examined, and the number that each byte of the payload adds. A description
#: can name fields and elements of zero bytes, at no cost for the peer. Only these two numbers limit them.
_FREE_STEPS: Final = 1024
_STEPS_PER_BYTE: Final = 4
#: Fields and elements in one piece of work: about ten milliseconds on a busy machine.
_PIECE: Final = 2000
#: Characters of a field's name in a message.
_SHOWN_NAME: Final = 80

_U32: Final = struct.Struct(">I")
T = TypeVar("T")
#: Work in pieces: a generator that yields after each piece, and returns its result.
Pieces = Generator[None, None, T]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A piece of a decoded payload: a field, an element of an array, or a subsection.

    A node is of one of three kinds: with ``children`` (structures, arrays of structures, subsections), with a
    ``value``, or with only ``raw``.
    """

    name: str
    #: The type in the description; "subsection" for a subsection.
    type: str
    #: Offset in bytes from the start of the payload.
    offset: int
    #: Size in bytes of the whole node.
    size: int
    #: The whole payload, which all nodes share.
    payload: memoryview = dataclasses.field(repr=False, compare=False)
    #: Whether the node is an array of plain values.
    array: bool = False
    children: tuple[Node, ...] = ()
    #: The node's index in an array of structures, or of elements that are described one by one.
    index: int | None = None
    #: Name of the structure or subsection, and its version.
    vmsd_name: str | None = None
    version: int | None = None

    @property
    def raw(self) -> bytes:
        """The bytes of the node."""
        return bytes(self.payload[self.offset : self.offset + self.size])

    @property
    def value(self) -> float | tuple[float, ...] | None:
        """An int, bool or float; a tuple of them for an array; None if the type is opaque, or has no plain value."""
        codec = SCALARS.get(self.type)
        if codec is None:
            return None
        values = tuple(value for (value,) in codec.iter_unpack(self.raw))
        return values if self.array else values[0]


@dataclasses.dataclass(slots=True)
class Allowance:
    """The number of fields and elements that may be examined, over all sections of one tail.

    Steps of a walk that failed stay counted, so the sum is bounded by the bytes of the tail.
    """

    free: int = _FREE_STEPS
    spent: int = 0

    def spend(self) -> int:
        """Count one step; returns the steps so far."""
        self.spent += 1
        return self.spent


def decode_payload(
    device: Mapping[str, Any], payload: bytes | memoryview, *, max_nodes: int | None = None
) -> tuple[Node, ...]:
    """Decode the fields and subsections of one whole *payload*, by its object in the description.

    The sizes of all fields, nested ones and array elements are checked against each other and against the payload.
    An array is described by its first element. So an array whose elements differ in size (vmstate.md part 7.6) is
    refused; :func:`uncertain_fields` lists the arrays that may be such.

    Args:
        max_nodes: the largest number of nodes that are made.

    Raises:
        RemoteProtocolError: naming device and field: the description does not fit the payload, or there are more nodes.
    """
    return whole(decoding(device, payload, max_nodes=max_nodes))


def decoding(
    device: Mapping[str, Any], payload: bytes | memoryview, *, max_nodes: int | None = None
) -> Pieces[tuple[Node, ...]]:
    """:func:`decode_payload` in pieces."""
    walk = _Walk(device, memoryview(payload).cast("B"), Allowance(), keep=True, max_nodes=max_nodes)
    nodes = yield from walk.structure(device, "")
    if walk.position != len(walk.data):
        doubt = uncertain_fields(device)
        last = nodes[-1].name if nodes else "(none)"
        hint = f"; elements of {', '.join(map(repr, doubt))} may differ in size" if doubt else ""
        raise walk.error(
            last, f"the description ends behind it, and the payload goes on to byte {len(walk.data)}{hint}"
        )
    return nodes


def measure_payload(device: Mapping[str, Any], data: bytes | memoryview) -> int:
    """The number of bytes at the start of *data* that are the payload of *device*, by its object in the description.

    Raises:
        RemoteProtocolError: naming device and field: the description does not fit the data.
    """
    return whole(measuring(device, data, Allowance()))


def measuring(
    device: Mapping[str, Any], data: bytes | memoryview, allowance: Allowance, *, before: int = 0
) -> Pieces[int]:
    """:func:`measure_payload` in pieces.

    Args:
        allowance: the steps left; the steps of this call are subtracted.
        before: bytes before *data* that count for the allowance.
    """
    walk = _Walk(device, memoryview(data).cast("B"), allowance, keep=False, before=before)
    yield from walk.structure(device, "")
    return walk.position


def whole(work: Pieces[T]) -> T:
    """Do all pieces of *work* and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def count(nodes: Sequence[Node]) -> int:
    """The number of nodes, including all children."""
    return sum(1 + count(node.children) for node in nodes)


def uncertain_fields(device: Mapping[str, Any]) -> tuple[str, ...]:
    """Arrays of *device* whose elements may differ in size although only the first is described."""
    found: list[str] = []

    def look(of: object, path: str) -> None:
        fields = of.get("fields") if isinstance(of, Mapping) else None
        for field in fields if isinstance(fields, list) else ():
            if not isinstance(field, Mapping):
                continue
            name = f"{path}{str(field.get('name'))[:_SHOWN_NAME]}"
            # A scalar has one size, so only compound and opaque elements are uncertain.
            if "array_len" in field and str(field.get("type")) not in SCALARS:
                found.append(name)
            look(field.get("struct"), name + ".")
            look(field, name + ".")
        subsections = of.get("subsections") if isinstance(of, Mapping) else None
        for subsection in subsections if isinstance(subsections, list) else ():
            look(subsection, path)

    look(device, "")
    return tuple(found)


class _Walk:
    """Walks through one payload in parallel with its description."""

    def __init__(
        self,
        device: Mapping[str, Any],
        data: memoryview,
        allowance: Allowance,
        *,
        keep: bool,
        before: int = 0,
        max_nodes: int | None = None,
    ) -> None:
        self.section = section_name(device)[:_SHOWN_NAME]
        self.data = data
        self.keep = keep
        self.max_nodes = max_nodes
        self.nodes = 0
        self.position = 0
        self._allowance = allowance
        self._limit = allowance.free + _STEPS_PER_BYTE * before

    def error(self, where: str, what: str) -> RemoteProtocolError:
        reason = f"field {where!r} at byte {self.position} of the payload: {what}"
        return RemoteProtocolError(reason, section=self.section)

    def take(self, size: int, where: str) -> None:
        left = len(self.data) - self.position
        if size > left:
            raise self.error(where, f"the description gives it {size} bytes, and {left} are left")
        self.position += size

    def step(self, where: str) -> bool:
        """Count a field or an element; returns True at the end of a piece of work."""
        spent = self._allowance.spend()
        if spent > self._limit + _STEPS_PER_BYTE * self.position:
            raise self.error(where, f"{spent} fields and elements are too many for so many bytes")
        return spent % _PIECE == 0

    def structure(self, of: Mapping[str, Any], path: str) -> Pieces[tuple[Node, ...]]:
        """Decode the fields and subsections of *of*."""
        nodes: list[Node] = []
        for field in key_of(of, "fields", list, self.section):
            if not isinstance(field, Mapping):
                raise bad(f"a field of {path or 'the device'} is {short(field)}", self.section)
            nodes += yield from self.field(field, path)
        subsections = key_of(of, "subsections", list, self.section) if "subsections" in of else ()
        for subsection in subsections:
            if not isinstance(subsection, Mapping):
                raise bad(f"a subsection of {path or 'the device'} is {short(subsection)}", self.section)
            nodes += yield from self.subsection(subsection, path)
        return tuple(nodes)

    def field(self, field: Mapping[str, Any], path: str) -> Pieces[list[Node]]:
        name = key_of(field, "name", str, self.section)
        kind = key_of(field, "type", str, self.section)
        size = key_of(field, "size", int, self.section)
        index = key_of(field, "index", int, self.section) if "index" in field else None
        count = key_of(field, "array_len", int, self.section) if "array_len" in field else None
        where = path + name[:_SHOWN_NAME]
        if self.step(where):
            yield
        inner = self._inner(field, kind, where)
        if inner is None:
            return self._plain(name, kind, size, count, index, where)
        if count is None:
            return (yield from self._compound(name, kind, size, index, inner, where))
        start = self.position
        elements: list[Node] = []
        for k in range(count):
            elements += yield from self._compound(name, kind, size, k, inner, f"{where}[{k}]")
        return self._node(name, kind, start, index, where, children=tuple(elements))

    def _inner(self, field: Mapping[str, Any], kind: str, where: str) -> Mapping[str, Any] | None:
        """The description of a structure; None for a field that is taken as *size* bytes."""
        if kind == "vstruct":
            return field if "fields" in field else None
        if kind != "struct":
            return None
        inner = field.get("struct")
        if not isinstance(inner, Mapping):
            raise bad(f"field {where!r} is a struct without description", self.section)
        return inner if "fields" in inner else None

    def _plain(self, name: str, kind: str, size: int, count: int | None, index: int | None, where: str) -> list[Node]:
        start = self.position
        codec = SCALARS.get(kind)
        if codec is not None and size != codec.size:
            raise self.error(where, f"a {kind} has {codec.size} bytes, not {size}")
        self.take(size * (1 if count is None else count), where)
        return self._node(name, kind, start, index, where, array=count is not None)

    def _compound(
        self, name: str, kind: str, size: int, index: int | None, inner: Mapping[str, Any], where: str
    ) -> Pieces[list[Node]]:
        start = self.position
        if self.step(where):
            yield
        children = yield from self.structure(inner, where + ".")
        if self.position - start != size:
            raise self.error(where, f"it has {self.position - start} bytes, and the description says {size}")
        return self._node(name, kind, start, index, where, children=children, of=inner)

    def subsection(self, of: Mapping[str, Any], path: str) -> Pieces[list[Node]]:
        start = self.position
        name = key_of(of, "vmsd_name", str, self.section)
        version = key_of(of, "version", int, self.section)
        where = path + name[:_SHOWN_NAME]
        if self.step(where):
            yield
        wire = name[: MAX_CSTR + 1].encode()
        if len(wire) > MAX_CSTR or version >= 2**32:
            raise bad(f"subsection {name!r:.80} with version {version}", self.section)
        head = bytes((Section.SUBSECTION, len(wire))) + wire + _U32.pack(version)
        self.take(len(head), where)
        if self.data[start : self.position] != head:
            self.position = start
            raise self.error(where, "the description has a subsection here, and the payload has not")
        children = yield from self.structure(of, where + ".")
        return self._node(name, "subsection", start, None, where, children=children, of=of)

    def _node(
        self,
        name: str,
        kind: str,
        start: int,
        index: int | None,
        where: str,
        *,
        array: bool = False,
        children: tuple[Node, ...] = (),
        of: Mapping[str, Any] | None = None,
    ) -> list[Node]:
        if not self.keep:
            return []
        self.nodes += 1
        if self.max_nodes is not None and self.nodes > self.max_nodes:
            raise self.error(where, f"there are more than the {self.max_nodes} fields that can be listed")
        vmsd_name, version = (of.get("vmsd_name"), of.get("version")) if of is not None else (None, None)
        return [
            Node(
                name=name,
                type=kind,
                offset=start,
                size=self.position - start,
                payload=self.data,
                array=array,
                children=children,
                index=index,
                vmsd_name=vmsd_name if isinstance(vmsd_name, str) else None,
                version=version if isinstance(version, int) else None,
            )
        ]
