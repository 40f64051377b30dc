"""The JSON description at the end of a stream: writing it, reading it, and decoding device state with its help.

A device section has no length and no tags. The description lists every field that was written with its type and size,
so whoever does not know the device can still find its end and its values (vmstate.md parts 6 and 7).

It comes from the peer, so nothing in it is believed before it is checked: the text has limits of size, number of
items and nesting, and every number in it is held against the payload.

Lists (``qtailq``, ``gtree``, …) put the keys of each element into the same JSON object, so that keys occur several
times. :class:`JsonObject` keeps all of them in order; a text that was parsed is built again to equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import RemoteProtocolError
from .constants import Section
from .vmstate import SCALARS

#: How the text of a description begins.
OPENING: Final = b'{"page_size"'
#: Fields and elements of one payload that are looked at.
MAX_NODES: Final = 1_000_000
#: Of these, how many before the payload's first byte, and how many more for each byte of it.
_FREE_NODES, _NODES_PER_BYTE = 1024, 4

_U32: Final = struct.Struct(">I")
# Always matches to the end of the text where a string is not closed, so that the work is linear in any case.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_quoted: Final = json.encoder.encode_basestring_ascii
_NO_MARKS: Final = bytes(b for b in range(256) if b not in b"[]{},")


class JsonObject(Mapping[str, Any]):
    """A JSON object that keeps every key, repeated ones too, in order. Looking up finds the first."""

    __slots__ = ("_first", "pairs")

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        #: All keys and values as they stand in the text.
        self.pairs = tuple(pairs)
        self._first = dict(reversed(self.pairs)) if len(self.pairs) > 1 else dict(self.pairs)

    def __getitem__(self, key: str) -> Any:
        return self._first[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for key, _ in self.pairs))

    def __len__(self) -> int:
        return len(self._first)

    def __repr__(self) -> str:
        return f"JsonObject({list(self.pairs)!r})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a description may be; a peer that exceeds it is refused. The largest seen so far has 116 KB."""

    #: Bytes of the text.
    max_bytes: int = 16 * 1024 * 1024
    #: Objects, arrays and commas.
    max_items: int = 1_000_000
    #: Objects and arrays inside each other.
    max_depth: int = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A description whose outermost shape was checked; what is in the devices is checked when it is used."""

    page_size: int
    #: One object per FULL section, in stream order.
    devices: tuple[JsonObject, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A piece of a decoded payload: a field, an element of an array, or a subsection.

    Exactly one of three kinds: with ``children`` (structures, arrays of structures, subsections), with a ``value``, or
    with nothing but ``raw``.
    """

    name: str
    #: The type in the description; "subsection" for a subsection.
    type: str
    #: Bytes from the start of the payload.
    offset: int
    #: Bytes of all of it.
    size: int
    raw: bytes
    #: int, bool or float; a tuple of them for an array; None where the type is opaque.
    value: float | tuple[float, ...] | None = None
    children: tuple[Node, ...] = ()
    #: Its place in an array of structures or of elements that are described one by one.
    index: int | None = None
    #: Name of the structure or subsection, and its version.
    vmsd_name: str | None = None
    version: int | None = None


def build(page_size: int, devices: Sequence[Mapping[str, Any]]) -> bytes:
    """The text for *devices*, in stream order, as QEMU spaces it."""
    return dump({"page_size": page_size, "devices": list(devices)})


def dump(value: Any) -> bytes:
    """JSON text of a mapping, a :class:`JsonObject` or what is inside one, with the separators of a description."""
    pieces: list[str] = []
    _dump(value, pieces)
    return "".join(pieces).encode()


def _dump(value: Any, pieces: list[str]) -> None:
    if type(value) is str:
        pieces.append(_quoted(value))
    elif type(value) is int:
        pieces.append(str(value))
    elif isinstance(value, Mapping):
        separator = "{"
        for key, inner in value.pairs if isinstance(value, JsonObject) else value.items():
            pieces.append(f"{separator}{_quoted(key)}: ")
            separator = ", "
            _dump(inner, pieces)
        pieces.append("}" if separator == ", " else "{}")
    elif isinstance(value, list | tuple):
        separator = "["
        for inner in value:
            pieces.append(separator)
            separator = ", "
            _dump(inner, pieces)
        pieces.append("]" if separator == ", " else "[]")
    else:
        pieces.append(json.dumps(value))


def parse(text: bytes, limits: Limits | None = None) -> Description:
    """Read the text of a description.

    Raises:
        RemoteProtocolError: it is not JSON, not a description, or exceeds *limits*.
    """
    top = _parse(text, limits or Limits())
    page_size, devices = top.get("page_size"), top.get("devices")
    if type(page_size) is not int or page_size <= 0:
        raise _bad(f"page_size is {_short(page_size)}")
    if not isinstance(devices, list):
        raise _bad("it has no list of devices")
    for device in devices:
        if not isinstance(device, JsonObject):
            raise _bad(f"a device is {_short(device)}, not an object")
        _key(device, "name", str, "device")
        _key(device, "instance_id", int, "device")
    return Description(page_size=page_size, devices=tuple(devices))


def _parse(text: bytes, limits: Limits) -> JsonObject:
    if len(text) > limits.max_bytes:
        raise _bad(f"it has {len(text)} bytes, more than {limits.max_bytes}")
    marks = _STRING.sub(b"", text).translate(None, _NO_MARKS)
    if len(marks) - marks.count(b"]") - marks.count(b"}") > limits.max_items:
        raise _bad(f"it has more than {limits.max_items} items")
    depth = 0
    for mark in marks:
        if mark in b"[{":
            depth += 1
            if depth > limits.max_depth:
                raise _bad(f"it is nested more than {limits.max_depth} levels deep")
        elif mark in b"]}":
            depth -= 1
    try:
        # Strings with half a surrogate pair would fail much later, where they are printed.
        top = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except ValueError as error:
        raise _bad(f"it is not valid JSON: {error}") from None
    if not isinstance(top, JsonObject):
        raise _bad(f"it is {_short(top)}, not an object")
    return top


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    for key, value in pairs:
        key.encode()
        if isinstance(value, str):
            value.encode()
    return JsonObject(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _bad(what: str, section: str | None = None) -> RemoteProtocolError:
    return RemoteProtocolError(f"the description of the devices cannot be used: {what}", section=section)


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _key(of: Mapping[str, Any], key: str, kind: type[Any], section: str) -> Any:
    """The value of a key that must be there once, with that type."""
    value = of.get(key)
    # bool is an int for Python, not for us.
    if type(value) is not kind:
        raise _bad(f"key {key!r} is {_short(value)}", section)
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise _bad(f"key {key!r} is {_short(value)}", section)
    if isinstance(of, JsonObject) and len(of.pairs) > len(of) and sum(name == key for name, _ in of.pairs) > 1:
        raise _bad(f"key {key!r} occurs more than once", section)
    return value


def section_name(device: Mapping[str, Any]) -> str:
    """How a device is called in messages: its idstr, and its instance id unless that is 0."""
    name, instance = str(device.get("name")), device.get("instance_id")
    return name if not instance else f"{name} ({instance})"


def decode_payload(device: Mapping[str, Any], payload: bytes | memoryview) -> tuple[Node, ...]:
    """The fields and subsections of one whole *payload*, by its object in the description.

    The sizes of all fields, nested ones and array elements are checked against each other and against the payload.
    An array is described by its first element, so where elements differ in size (vmstate.md part 7.6) it is refused;
    :func:`uncertain_fields` tells which ones those can be.

    Raises:
        RemoteProtocolError: naming device and field: the description does not fit the payload.
    """
    walk = _Walk(device, memoryview(payload).cast("B"), keep=True)
    nodes = walk.structure(device, "")
    if walk.position != len(walk.data):
        doubt = uncertain_fields(device)
        last = nodes[-1].name if nodes else "(none)"
        hint = f"; elements of {', '.join(map(repr, doubt))} may differ in size" if doubt else ""
        raise walk.error(
            last, f"the description ends behind it, and the payload goes on to byte {len(walk.data)}{hint}"
        )
    return nodes


def measure_payload(device: Mapping[str, Any], data: bytes | memoryview) -> int:
    """How many bytes at the start of *data* are the payload of *device*, going by its object in the description.

    Raises:
        RemoteProtocolError: naming device and field: the description does not fit what is there.
    """
    walk = _Walk(device, memoryview(data).cast("B"), keep=False)
    walk.structure(device, "")
    return walk.position


def uncertain_fields(device: Mapping[str, Any]) -> tuple[str, ...]:
    """Arrays of *device* whose elements may differ in size although only the first is described."""
    found: list[str] = []

    def look(of: object, path: str) -> None:
        fields = of.get("fields") if isinstance(of, Mapping) else None
        for field in fields if isinstance(fields, list) else ():
            if not isinstance(field, Mapping):
                continue
            name = f"{path}{field.get('name')}"
            # A scalar has one size, so only compound and opaque elements are in doubt.
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
    """Goes through one payload side by side with its description."""

    def __init__(self, device: Mapping[str, Any], data: memoryview, *, keep: bool) -> None:
        self.section = section_name(device)
        self.data = data
        self.keep = keep
        self.position = 0
        self.steps = 0

    def error(self, where: str, what: str) -> RemoteProtocolError:
        reason = f"field {where!r} at byte {self.position} of the payload: {what}"
        return RemoteProtocolError(reason, section=self.section)

    def take(self, size: int, where: str) -> memoryview:
        left = len(self.data) - self.position
        if size > left:
            raise self.error(where, f"the description gives it {size} bytes, and {left} are left")
        piece = self.data[self.position : self.position + size]
        self.position += size
        return piece

    def step(self, where: str) -> None:
        # Fields and elements without a single byte cost the peer nothing: only this keeps their number down.
        self.steps += 1
        if self.steps > min(MAX_NODES, _FREE_NODES + _NODES_PER_BYTE * self.position):
            raise self.error(where, f"{self.steps} fields and elements are too many")

    def structure(self, of: Mapping[str, Any], path: str) -> tuple[Node, ...]:
        """The fields and subsections of *of*."""
        nodes: list[Node] = []
        for field in _key(of, "fields", list, self.section):
            if not isinstance(field, Mapping):
                raise _bad(f"a field of {path or 'the device'} is {_short(field)}", self.section)
            nodes += self.field(field, path)
        subsections = _key(of, "subsections", list, self.section) if "subsections" in of else ()
        for subsection in subsections:
            if not isinstance(subsection, Mapping):
                raise _bad(f"a subsection of {path or 'the device'} is {_short(subsection)}", self.section)
            nodes += self.subsection(subsection, path)
        return tuple(nodes)

    def field(self, field: Mapping[str, Any], path: str) -> list[Node]:
        name = _key(field, "name", str, self.section)
        kind = _key(field, "type", str, self.section)
        size = _key(field, "size", int, self.section)
        index = _key(field, "index", int, self.section) if "index" in field else None
        count = _key(field, "array_len", int, self.section) if "array_len" in field else None
        where = path + name
        self.step(where)
        inner = self._inner(field, kind, where)
        if inner is None:
            return self._plain(name, kind, size, count, index, where)
        if count is None:
            return self._compound(name, kind, size, index, inner, where)
        start = self.position
        elements: list[Node] = []
        for k in range(count):
            elements += self._compound(name, kind, size, k, inner, f"{where}[{k}]")
        return self._node(name, kind, start, index, children=tuple(elements))

    def _inner(self, field: Mapping[str, Any], kind: str, where: str) -> Mapping[str, Any] | None:
        """The description of a structure; None for whatever is taken as *size* bytes."""
        if kind == "vstruct":
            return field if "fields" in field else None
        if kind != "struct":
            return None
        inner = field.get("struct")
        if not isinstance(inner, Mapping):
            raise _bad(f"field {where!r} is a struct without description", self.section)
        return inner if "fields" in inner else None

    def _plain(self, name: str, kind: str, size: int, count: int | None, index: int | None, where: str) -> list[Node]:
        start = self.position
        codec = SCALARS.get(kind)
        if codec is not None and size != codec.size:
            raise self.error(where, f"a {kind} has {codec.size} bytes, not {size}")
        raw = self.take(size * (1 if count is None else count), where)
        value: float | tuple[float, ...] | None = None
        if codec is not None and self.keep:
            values = tuple(element for (element,) in codec.iter_unpack(raw))
            value = values[0] if count is None else values
        return self._node(name, kind, start, index, value=value)

    def _compound(
        self, name: str, kind: str, size: int, index: int | None, inner: Mapping[str, Any], where: str
    ) -> list[Node]:
        start = self.position
        self.step(where)
        children = self.structure(inner, where + ".")
        if self.position - start != size:
            raise self.error(where, f"it has {self.position - start} bytes, and the description says {size}")
        return self._node(name, kind, start, index, children=children, of=inner)

    def subsection(self, of: Mapping[str, Any], path: str) -> list[Node]:
        start = self.position
        name = _key(of, "vmsd_name", str, self.section)
        version = _key(of, "version", int, self.section)
        where = path + name
        self.step(where)
        wire = name.encode()
        if len(wire) > 255 or version >= 2**32:
            raise _bad(f"subsection {name!r:.80} with version {version}", self.section)
        head = bytes((Section.SUBSECTION, len(wire))) + wire + _U32.pack(version)
        if bytes(self.take(len(head), where)) != head:
            self.position = start
            raise self.error(where, "the description has a subsection here, and the payload has not")
        children = self.structure(of, where + ".")
        return self._node(name, "subsection", start, None, children=children, of=of)

    def _node(
        self,
        name: str,
        kind: str,
        start: int,
        index: int | None,
        *,
        value: float | tuple[float, ...] | None = None,
        children: tuple[Node, ...] = (),
        of: Mapping[str, Any] | None = None,
    ) -> list[Node]:
        if not self.keep:
            return []
        vmsd_name, version = (of.get("vmsd_name"), of.get("version")) if of is not None else (None, None)
        return [
            Node(
                name=name,
                type=kind,
                offset=start,
                size=self.position - start,
                raw=bytes(self.data[start : self.position]),
                value=value,
                children=children,
                index=index,
                vmsd_name=vmsd_name if isinstance(vmsd_name, str) else None,
                version=version if isinstance(version, int) else None,
            )
        ]
