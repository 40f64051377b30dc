"""Device state from one declaration, which gives the bytes, their length and their JSON description.

A device section is the values of its fields back to back, without tags, lengths or padding (vmstate.md parts 1-3), so
both ends must use the same list of fields. :class:`VMState` is that list. The state itself is any mapping, or any
object with attributes named like the fields::

    CLOCK = VMState("clock", version=2, fields=(
        Field("now", "int64"),
        Field("alarms", "timer", count=4),
        Field("zone", "uint8", since=2),
    ))

Values by type: integers are ``int``; ``bool`` is ``bool``; ``timer`` is nanoseconds or None for "not armed";
``buffer`` is ``bytes``; ``bitmap`` is an ``int`` whose bit k is bit k of the map; ``CPU_Double_U`` is ``float``; a
nested :class:`VMState` is a ``dict``; with *count*, a ``list`` of these. ``unused_buffer`` has no value.

The fields of a subsection belong to the structure around it: they are read from and stored in the same mapping.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from ...errors import LocalProtocolError, RemoteProtocolError
from ..constants import MAX_CSTR, Section

#: A condition; the argument is the state as far as it is known (all of it when saving).
Needed = Callable[[Mapping[str, Any]], bool]
#: A condition for one field; the second argument is the version that is being read or written.
When = Callable[[Mapping[str, Any], int], bool]

_EQUAL: Final = frozenset({"uint8 equal", "uint16 equal", "int32 equal", "uint32 equal", "int64 equal"})
_SIZED: Final = frozenset({"buffer", "unused_buffer", "bitmap"})
_NOT_ARMED: Final = 2**64 - 1

#: The wire format of types of fixed length, by their name in the JSON description. ``int64 equal`` is unsigned in spite
#: of its name, and "le" means less or equal, not little-endian.
SCALARS: Final = MappingProxyType(
    {
        name: struct.Struct(">" + code)
        for name, code in {
            "bool": "?",
            "int8": "b",
            "int16": "h",
            "int32": "i",
            "int64": "q",
            "uint8": "B",
            "uint16": "H",
            "uint32": "I",
            "uint64": "Q",
            "uint8 equal": "B",
            "uint16 equal": "H",
            "int32 equal": "i",
            "uint32 equal": "I",
            "int64 equal": "Q",
            "int32 le": "i",
            "timer": "Q",
            "CPU_Double_U": "d",
        }.items()
    }
)

_TYPES: Final = ", ".join((*SCALARS, *sorted(_SIZED)))
_U32: Final = struct.Struct(">I")
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class _NeedMore(Exception):
    """The data ends inside the state; raised only in :meth:`VMState.measure`."""


class _Attributes(Mapping[str, Any]):
    """A mapping view of an object's attributes."""

    __slots__ = ("_object",)

    def __init__(self, of: object) -> None:
        self._object = of

    def __getitem__(self, key: str) -> Any:
        try:
            return getattr(self._object, key)
        except AttributeError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._object))

    def __len__(self) -> int:
        return len(vars(self._object))


def _mapping(state: object) -> Mapping[str, Any]:
    return state if isinstance(state, Mapping) else _Attributes(state)


class _Cursor:
    """Reads the data of one section in order; its errors name the section and the field."""

    __slots__ = ("data", "final", "position", "section")

    def __init__(self, data: memoryview, section: str, *, final: bool) -> None:
        self.data = data
        self.section = section
        self.final = final
        self.position = 0

    def error(self, where: str, what: str) -> RemoteProtocolError:
        reason = f"field {where!r} at byte {self.position} of the payload: {what}"
        return RemoteProtocolError(reason, section=self.section)

    def take(self, size: int, where: str) -> memoryview:
        piece = self.peek(0, size)
        if piece is None:
            left = len(self.data) - self.position
            raise self.error(where, f"needs {size} bytes, and {left} are left")
        self.position += size
        return piece

    def peek(self, skip: int, size: int) -> memoryview | None:
        """Bytes ahead; None if the data is complete and ends before them."""
        start = self.position + skip
        if len(self.data) - start < size:
            if not self.final:
                raise _NeedMore
            return None
        return self.data[start : start + size]


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One field of a :class:`VMState`."""

    #: The name in the description, and the key or attribute in the state.
    name: str
    #: A type name of the JSON description (vmstate.md part 2), or the declaration of a nested structure.
    type: str | VMState
    _: dataclasses.KW_ONLY
    #: Makes the field an array: the number of elements, or the name of the field with that number.
    count: int | str | None = None
    #: Bytes of a buffer, bits of a bitmap, or the name of the field with that number.
    size: int | str | None = None
    #: The number of the first version with this field.
    since: int = 0
    #: The field is present only if this is true.
    when: When | None = None
    #: Largest *count* or *size* that another field may give.
    maximum: int = 65536

    def __post_init__(self) -> None:
        if isinstance(self.type, str) and self.type not in SCALARS and self.type not in _SIZED:
            raise ValueError(f"field {self.name!r}: unknown type {self.type!r}; there are {_TYPES}, or a VMState")
        if (self.type in _SIZED) != (self.size is not None):
            need = f"{self.type} needs size={'BITS' if self.type == 'bitmap' else 'BYTES'}"
            raise ValueError(f"field {self.name!r}: {need if self.size is None else 'only buffers, bitmaps have size'}")
        if any(isinstance(n, int) and n < 0 for n in (self.count, self.size)):
            raise ValueError(f"field {self.name!r}: a negative length")

    @property
    def compressible(self) -> bool:
        """Whether an array of this field is described by its first element alone."""
        if self.when is not None:
            return False
        if isinstance(self.type, VMState):
            return not self.type.subsections and all(field.compressible for field in self.type.fields)
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class Subsection:
    """An optional part of a :class:`VMState`: its declaration *vmstate*, sent when it is needed.

    Without *needed* the subsection is sent if the state has a value other than None for each of its fields.
    """

    vmstate: VMState
    needed: Needed | None = None

    def wanted(self, state: Mapping[str, Any]) -> bool:
        """Whether the subsection is sent with *state*."""
        if self.needed is not None:
            return self.needed(state)
        return all(
            # None is a legal value of a timer: not armed.
            field.name in state and (field.type == "timer" or state[field.name] is not None)
            for field in self.vmstate.fields
            if field.type != "unused_buffer"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class VMState:
    """The declaration of one structure: a device, a structure nested in it, or a subsection.

    It has the *name* and the *version* (a number) of the structure, its *fields* in order, and its *subsections*.

    Raises:
        ValueError: a subsection whose name does not begin with this structure's name; no reader would find it.
    """

    name: str
    _: dataclasses.KW_ONLY
    version: int = 1
    #: Number of the oldest version that can be read; the default is *version*.
    minimum_version: int = -1
    fields: Sequence[Field]
    subsections: Sequence[Subsection] = ()
    #: Names in the description: a name that occurs several times gets its number appended.
    _labels: Sequence[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.minimum_version < 0:
            object.__setattr__(self, "minimum_version", self.version)
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "subsections", tuple(self.subsections))
        for subsection in self.subsections:
            name = subsection.vmstate.name
            if not name.startswith(self.name) or name == self.name or len(name.encode()) > MAX_CSTR:
                raise ValueError(f"subsection {name!r} must be called {self.name + '/…'!r}, {MAX_CSTR} bytes at most")
        names = [field.name for field in self.fields]
        labels = [f"{name}[{names[:k].count(name)}]" if names.count(name) > 1 else name for k, name in enumerate(names)]
        object.__setattr__(self, "_labels", tuple(labels))

    def encode(self, state: object) -> bytes:
        """The bytes of *state* (a mapping or an object) in this version.

        Raises:
            LocalProtocolError: a field is missing, of the wrong type or length, or out of its range.
        """
        out = bytearray()
        self._save(_mapping(state), out, "")
        return bytes(out)

    def describe(self, state: object) -> dict[str, Any]:
        """The JSON object for the bytes that :meth:`encode` writes for *state*: vmsd_name, version, fields,
        [subsections].

        Raises:
            LocalProtocolError: as for :meth:`encode`.
        """
        return self._save(_mapping(state), bytearray(), "")

    def decode(
        self,
        data: bytes | bytearray | memoryview,
        version: int | None = None,
        *,
        local: object = _NOTHING,
        section: str | None = None,
    ) -> dict[str, Any]:
        """Decode the values in *data*, which is one whole payload of *version* (default: this version).

        Fields that are not in that version, or in a subsection that was not sent, are not in the result.

        Args:
            local: the state that will be replaced. The types "equal" and "le" are compared with its values. Conditions
                and lengths use its values for fields that are not in the data. Values that are missing in it are not
                compared.
            section: the name for error messages; the default is this structure's name.

        Raises:
            RemoteProtocolError: the version is not readable; the data is too short or too long; a value is refused.
        """
        cursor = _Cursor(memoryview(data).cast("B"), section or self.name, final=True)
        state = self._load_versioned(cursor, version, _mapping(local))
        if cursor.position != len(cursor.data):
            left = len(cursor.data) - cursor.position
            raise RemoteProtocolError(
                f"{left} bytes are left behind its last field, at byte {cursor.position} of the payload",
                section=cursor.section,
            )
        return state

    def measure(
        self,
        data: bytes | bytearray | memoryview,
        version: int | None = None,
        *,
        local: object = _NOTHING,
        section: str | None = None,
    ) -> int | None:
        """The number of bytes at the start of *data* that are one payload; None if more data is needed.

        A structure with subsections needs one byte more than its payload, which tells whether a subsection follows.
        Arguments and errors as for :meth:`decode`.
        """
        cursor = _Cursor(memoryview(data).cast("B"), section or self.name, final=False)
        try:
            self._load_versioned(cursor, version, _mapping(local))
        except _NeedMore:
            return None
        return cursor.position

    # Saving. One walk makes the bytes and the description, so that they always agree.

    def _save(self, state: Mapping[str, Any], out: bytearray, path: str) -> dict[str, Any]:
        fields: list[dict[str, Any]] = []
        for field, label in zip(self.fields, self._labels, strict=True):
            if field.since <= self.version and (field.when is None or field.when(state, self.version)):
                fields += self._save_field(field, label, state, out, path)
        result: dict[str, Any] = {"vmsd_name": self.name, "version": self.version, "fields": fields}
        described = []
        for subsection in self.subsections:
            if subsection.wanted(state):
                name = subsection.vmstate.name.encode()
                out += bytes((Section.SUBSECTION, len(name))) + name + _U32.pack(subsection.vmstate.version)
                described.append(subsection.vmstate._save(state, out, path))
        if described:
            result["subsections"] = described
        return result

    def _save_field(
        self, field: Field, label: str, state: Mapping[str, Any], out: bytearray, path: str
    ) -> list[dict[str, Any]]:
        where = path + field.name
        value = None
        if field.type != "unused_buffer":
            try:
                value = state[field.name]
            except KeyError:
                raise _unsendable(self, where, "it is missing in the state of the device") from None
        size = self._length_to_save(field, field.size, state, where)
        count = self._length_to_save(field, field.count, state, where)
        if field.count is None:
            values: Sequence[Any] = (value,)
        elif field.type == "unused_buffer":
            values = (None,) * count
        else:
            values = value  # type: ignore[assignment]  # whatever it is, its length is checked next
            try:
                got = len(values)
            except TypeError:
                raise _unsendable(self, where, f"an array of {count} is needed, not {value!r}") from None
            if got != count:
                raise _unsendable(self, where, f"it has {got} elements and must have {count}")
        described: list[dict[str, Any]] = []
        for k, element in enumerate(values):
            at = where if field.count is None else f"{where}[{k}]"
            start = len(out)
            nested = None
            if isinstance(field.type, VMState):
                nested = field.type._save(_mapping(element), out, at + ".")
            else:
                out += _pack(self, field.type, element, size, at)
            if k == 0 or not field.compressible:
                entry: dict[str, Any] = {"name": label}
                if len(values) > 1:
                    entry.update({"array_len": count} if field.compressible else {"index": k})
                entry["type"] = "struct" if nested is not None else field.type
                if nested is not None:
                    entry["struct"] = nested
                entry["size"] = len(out) - start
                described.append(entry)
        return described

    def _length_to_save(self, field: Field, length: int | str | None, state: Mapping[str, Any], where: str) -> int:
        if not isinstance(length, str):
            return length or 0
        value = state.get(length)
        if not isinstance(value, int) or not 0 <= value <= field.maximum:
            raise _unsendable(self, where, f"its length {length!r} is {value!r}, outside 0 to {field.maximum}")
        return value

    # Loading.

    def _load_versioned(self, cursor: _Cursor, version: int | None, local: Mapping[str, Any]) -> dict[str, Any]:
        version = self.version if version is None else version
        if not self.minimum_version <= version <= self.version:
            raise RemoteProtocolError(
                f"version {version} of {self.name!r} cannot be read, only {self.minimum_version} to {self.version}",
                section=cursor.section,
            )
        state: dict[str, Any] = {}
        self._load(cursor, version, state, local, "")
        return state

    def _load(self, cursor: _Cursor, version: int, state: dict[str, Any], local: Mapping[str, Any], path: str) -> None:
        known = ChainMap(state, local)  # type: ignore[arg-type]  # only ever read through it
        for field in self.fields:
            where = path + field.name
            try:
                present = field.since <= version and (field.when is None or field.when(known, version))
            except KeyError as missing:
                raise cursor.error(where, f"whether it is there depends on {missing}, which was not sent") from None
            if not present:
                continue
            size = _length_to_load(cursor, field, field.size, known, where)
            count = _length_to_load(cursor, field, field.count, known, where)
            there = local.get(field.name)
            if field.count is None:
                value = _load_element(cursor, field.type, size, there, where)
            else:
                theirs = there if isinstance(there, Sequence) and len(there) == count else (None,) * count
                value = [_load_element(cursor, field.type, size, theirs[k], f"{where}[{k}]") for k in range(count)]
            if field.type != "unused_buffer":
                state[field.name] = value
        if self.subsections:
            while (found := self._next_subsection(cursor)) is not None:
                found[0]._load(cursor, found[1], state, local, path)

    def _next_subsection(self, cursor: _Cursor) -> tuple[VMState, int] | None:
        """The subsection that begins here; None if these bytes belong to another structure (vmstate.md part 3)."""
        own = self.name.encode()
        mark = cursor.peek(0, 1)
        if mark is None or mark[0] != Section.SUBSECTION:
            return None
        length = cursor.peek(1, 1)
        if length is None or length[0] < len(own) + 1:
            return None
        # Decide with as few bytes as possible: the sender may wait for an answer after the next few bytes.
        start = cursor.position + 2
        if not own.startswith(bytes(cursor.data[start : start + len(own)])):
            return None
        name = cursor.peek(2, length[0])
        if name is None:
            return None
        text = bytes(name).decode(errors="replace")
        for subsection in self.subsections:
            inner = subsection.vmstate
            if inner.name == text:
                cursor.take(2 + length[0], text)
                version = _U32.unpack(cursor.take(4, text))[0]
                if not inner.minimum_version <= version <= inner.version:
                    raise cursor.error(
                        text, f"version {version} cannot be read, only {inner.minimum_version} to {inner.version}"
                    )
                return inner, version
        raise cursor.error(text, f"{self.name!r} has no such subsection")


def _unsendable(of: VMState, where: str, what: str) -> LocalProtocolError:
    return LocalProtocolError(f"state {of.name!r}, field {where!r}: {what}")


def _pack(of: VMState, kind: str, value: Any, size: int, where: str) -> bytes:
    if kind == "unused_buffer":
        return bytes(size)
    if kind == "buffer":
        if not isinstance(value, bytes | bytearray | memoryview) or len(value) != size:
            raise _unsendable(of, where, f"{size} bytes are needed, not {value!r:.80}")
        return bytes(value)
    if kind == "bool" and not (isinstance(value, int) and value in (0, 1)):
        raise _unsendable(of, where, f"{value!r} is not a bool")
    if kind == "timer" and value is None:
        value = _NOT_ARMED
    try:
        if kind == "bitmap":
            words = -(-size // 64)
            # Big-endian words with the lowest word first.
            little: bytes = value.to_bytes(8 * words, "little")
            return struct.pack(f">{words}Q", *struct.unpack(f"<{words}Q", little))
        return SCALARS[kind].pack(value)
    except (struct.error, OverflowError, AttributeError, TypeError) as error:
        raise _unsendable(of, where, f"{value!r:.80} is no {kind} ({error})") from None


def _length_to_load(
    cursor: _Cursor, field: Field, length: int | str | None, known: Mapping[str, Any], where: str
) -> int:
    if not isinstance(length, str):
        return length or 0
    value = known.get(length)
    if not isinstance(value, int) or not 0 <= value <= field.maximum:
        raise cursor.error(where, f"its length {length!r} is {value!r}, outside 0 to {field.maximum}")
    return value


def _load_element(cursor: _Cursor, kind: str | VMState, size: int, there: Any, where: str) -> Any:
    """Load one value; *there* is the local value that it replaces, or None."""
    if isinstance(kind, VMState):
        state: dict[str, Any] = {}
        # A nested structure has no version on the wire: the reader uses its own version.
        kind._load(cursor, kind.version, state, _NOTHING if there is None else _mapping(there), where + ".")
        return state
    if kind == "unused_buffer":
        cursor.take(size, where)
        return None
    if kind == "buffer":
        return bytes(cursor.take(size, where))
    if kind == "bitmap":
        words = -(-size // 64)
        raw = struct.unpack(f">{words}Q", cursor.take(8 * words, where))
        return int.from_bytes(struct.pack(f"<{words}Q", *raw), "little")
    codec = SCALARS[kind]
    value = codec.unpack(cursor.take(codec.size, where))[0]
    if kind == "timer":
        return None if value == _NOT_ARMED else value
    if there is not None:
        if kind in _EQUAL and value != there:
            raise cursor.error(where, f"the source has {value}, here it must be {there}")
        if kind == "int32 le" and not 0 <= value <= there:
            raise cursor.error(where, f"{value} is not between 0 and {there}")
    elif kind == "int32 le" and value < 0:
        raise cursor.error(where, f"{value} is negative")
    return value
