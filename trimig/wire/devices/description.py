"""Writes and reads the JSON description at the end of a stream.

A device section has no length and no tags. The description lists every field that was written with its type and size,
so a reader that does not know the device can still find its end and its values (:mod:`.decoding`; vmstate.md parts 6 and
7).

The description comes from the peer, so everything in it is checked: the text has limits of size, number of items and
nesting.

Lists (``qtailq``, ``gtree``, …) put the keys of each element into the same JSON object, so that keys occur several
times. :class:`JsonObject` keeps all of them in order; a parsed text is written again with equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...errors import RemoteProtocolError

_ESCAPED: Final = re.compile(rb"\\.", re.DOTALL)
#: Half of a surrogate pair, or a whole one, as an escape.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
#: Bytes of a text that are checked in one piece, so that no single call holds Python's lock for long.
_PIECE: Final = 256 * 1024
#: Objects that are made in one piece of work.
_OBJECTS: Final = 256
_quoted: Final = json.encoder.encode_basestring_ascii
_NO_MARKS: Final = bytes(b for b in range(256) if b not in b"[]{},")


class JsonObject(Mapping[str, Any]):
    """A JSON object that keeps every key, also repeated ones, in order. A lookup finds the first."""

    __slots__ = ("_first", "pairs", "repeated")

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        #: All keys and values in the order of the text.
        self.pairs = tuple(pairs)
        self._first = dict(reversed(self.pairs)) if len(self.pairs) > 1 else dict(self.pairs)
        #: Keys that occur several times.
        self.repeated: frozenset[str] = frozenset()
        if len(self._first) < len(self.pairs):
            counts = Counter(key for key, _ in self.pairs)
            self.repeated = frozenset(key for key, count in counts.items() if count > 1)

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
    """Limits of a description; a peer that exceeds them is refused. The largest known description has 116 KB."""

    #: Bytes of the text.
    max_bytes: int = 16 * 1024 * 1024
    #: Objects, arrays and commas.
    max_items: int = 1_000_000
    #: Nesting depth of objects and arrays.
    max_depth: int = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A description whose outermost level was checked; the content of the devices is checked when it is used."""

    page_size: int
    #: One object per FULL section, in stream order.
    devices: tuple[JsonObject, ...]


def build(page_size: int, devices: Sequence[Mapping[str, Any]]) -> bytes:
    """The text for *devices*, in stream order, with QEMU's spacing."""
    return dump({"page_size": page_size, "devices": list(devices)})


def dump(value: Any) -> bytes:
    """JSON text of a mapping, a :class:`JsonObject` or a value inside one, with the separators of a description."""
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


def parse(text: bytes, limits: Limits | None = None, *, between: Callable[[], None] | None = None) -> Description:
    """Read the text of a description.

    Args:
        between: called after every few objects; an exception of it ends the reading.

    Raises:
        RemoteProtocolError: the text is not JSON, not a description, or exceeds *limits*.
    """
    top = _parse(text, limits or Limits(), between)
    page_size, devices = top.get("page_size"), top.get("devices")
    if type(page_size) is not int or page_size <= 0:
        raise bad(f"page_size is {short(page_size)}")
    if not isinstance(devices, list):
        raise bad("it has no list of devices")
    for device in devices:
        if not isinstance(device, JsonObject):
            raise bad(f"a device is {short(device)}, not an object")
        key_of(device, "name", str, "device")
        key_of(device, "instance_id", int, "device")
    return Description(page_size=page_size, devices=tuple(devices))


def _parse(text: bytes, limits: Limits, between: Callable[[], None] | None) -> JsonObject:
    if len(text) > limits.max_bytes:
        raise bad(f"it has {len(text)} bytes, more than {limits.max_bytes}")
    _check_shape(text, limits)
    try:
        # Strings with half a surrogate pair would fail much later, when they are printed.
        hook: Callable[[list[tuple[str, Any]]], JsonObject]
        hook = _encodable_object if _SURROGATE.search(text) else JsonObject
        if between is not None:
            hook = _in_pieces(hook, between)
        top = json.loads(text.decode(), object_pairs_hook=hook, parse_constant=_no_constant)
    except ValueError as error:
        raise bad(f"it is not valid JSON: {error}") from None
    if not isinstance(top, JsonObject):
        raise bad(f"it is {short(top)}, not an object")
    return top


def _check_shape(text: bytes, limits: Limits) -> None:
    """Count items and levels before anything is built, with work in proportion to the text. RemoteProtocolError."""
    items = depth = at = 0
    inside = False  # whether the position is inside a string
    while at < len(text):
        stop = min(at + _PIECE, len(text))
        while stop < len(text) and text[stop - 1] == 0x5C:
            stop += 1  # do not separate a backslash from the escaped byte
        piece = text[at:stop]
        if b"\\" in piece:
            piece = _ESCAPED.sub(b"", piece)
        # Opening and closing quotes alternate: every second part between quotes is outside of strings.
        between = piece.split(b'"')
        marks = np.frombuffer(b"".join(between[int(inside) :: 2]).translate(None, _NO_MARKS), np.uint8)
        inside ^= len(between) % 2 == 0
        opens = (marks == ord("{")) | (marks == ord("["))
        closes = (marks == ord("}")) | (marks == ord("]"))
        items += len(marks) - int(np.count_nonzero(closes))
        if items > limits.max_items:
            raise bad(f"it has more than {limits.max_items} items")
        if len(marks):
            levels = depth + np.cumsum(opens.astype(np.int64) - closes.astype(np.int64))
            if int(levels.max()) > limits.max_depth:
                raise bad(f"it is nested more than {limits.max_depth} levels deep")
            depth = int(levels[-1])
        at = stop


def _encodable_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    for key, value in pairs:
        key.encode()
        if isinstance(value, str):
            value.encode()
    return JsonObject(pairs)


def _in_pieces(
    make: Callable[[list[tuple[str, Any]]], JsonObject], between: Callable[[], None]
) -> Callable[[list[tuple[str, Any]]], JsonObject]:
    """*make*, and a call of *between* after each _OBJECTS of them."""
    left = _OBJECTS

    def hook(pairs: list[tuple[str, Any]]) -> JsonObject:
        nonlocal left
        left -= 1
        if not left:
            left = _OBJECTS
            between()
        return make(pairs)

    return hook


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def bad(what: str, section: str | None = None) -> RemoteProtocolError:
    """The error for a description that cannot be used; *what* is the reason."""
    return RemoteProtocolError(f"the description of the devices cannot be used: {what}", section=section)


def short(value: object) -> str:
    """*value* for a message, cut to a bounded length."""
    return f"{value!r:.60}"


def key_of(of: Mapping[str, Any], key: str, kind: type[Any], section: str) -> Any:
    """The value of a key that must occur once, with the type *kind*."""
    value = of.get(key)
    # In Python bool is a subclass of int; here it is another type.
    if type(value) is not kind:
        raise bad(f"key {key!r} is {short(value)}", section)
    if isinstance(value, int) and not 0 <= value < 2**63:
        raise bad(f"key {key!r} is {short(value)}", section)
    if isinstance(of, JsonObject) and key in of.repeated:
        raise bad(f"key {key!r} occurs more than once", section)
    return value


def section_name(device: Mapping[str, Any]) -> str:
    """The name of a device in messages: its idstr, and its instance id unless that is 0."""
    name, instance = str(device.get("name")), device.get("instance_id")
    return name if not instance else f"{name} ({instance})"
