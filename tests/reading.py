"""What a stream means, read anew: elements, and the memory that a destination must have after it.

Nothing of trimig is used here, so that a fault of trimig's reader and a like one of its writer cannot hide each other. It
reads whole streams of well-behaved sources, and refuses everything else with the place.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
COMMANDS = {
    1: "OPEN_RETURN_PATH", 2: "PING", 3: "ADVISE", 4: "LISTEN", 5: "RUN", 6: "DISCARD", 7: "PACKAGED", 8: "ENABLE_COLO",
    9: "RESUME", 10: "RECV_BITMAP", 11: "SWITCHOVER_START",
}  # fmt: skip
_KINDS = {1: "start", 2: "part", 3: "end", 4: "full"}


class Unreadable(AssertionError):
    """The stream breaks a rule; the text says where."""


@dataclasses.dataclass(frozen=True)
class Page:
    """One page record; *data* has 4096 bytes."""

    block: str
    number: int
    zero: bool
    data: bytes


@dataclasses.dataclass(frozen=True)
class Element:
    """One element of a stream. ``str()`` is a word for it: ``"PING 3"``, ``"full clock"``, ``"eof"``."""

    word: str
    at: int
    end: int
    payload: bytes = b""
    pages: tuple[Page, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()
    inner: tuple[Element, ...] = ()

    def __str__(self) -> str:
        return self.word


def elements(
    data: bytes,
    devices: Mapping[str, int],
    *,
    head: bool = True,
    footers: bool = True,
    configuration: bool = True,
) -> list[Element]:
    """All elements of *data*.

    Args:
        devices: bytes of state of each device, by its name; that of the run state is known.
        head: it begins with a file header (and *configuration*).
    """
    return list(_Reader(data, devices, footers).stream(head=head, configuration=configuration))


def words(found: list[Element]) -> list[str]:
    """The word of each; repeated ones once."""
    names = [element.word for element in found]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


def reader(data: bytes, devices: Mapping[str, int], seen: Callable[[Page], None], block: str = "") -> _Reader:
    """Reads *data* from the beginning of a stream, or from where the last record was of *block*.

    Args:
        seen: hears of each page at once; what it raises ends the reading.
    """
    found = _Reader(data, devices, True, seen=seen)
    found._block = block
    return found


class _Reader:
    def __init__(
        self,
        data: bytes,
        devices: Mapping[str, int],
        footers: bool,
        base: int = 0,
        seen: Callable[[Page], None] = lambda _: None,
    ) -> None:
        self._seen = seen
        self._data = data
        self._devices = {"globalstate": 104, **devices}
        self._footers = footers
        self._base = base
        self._at = 0
        self._block = ""
        self._blocks: dict[str, int] = {}

    def stream(self, *, head: bool, configuration: bool) -> Iterator[Element]:
        if head:
            if self._take(8) != b"QEVM\0\0\0\3":
                raise Unreadable("no file header")
            yield Element("header", 0, 8)
            if configuration:
                if self._number(1) != 7:
                    raise Unreadable("no configuration section")
                name = self._take(self._number(4))
                yield Element("configuration", 8, self._at, payload=name)
        while self._at < len(self._data):
            element = self._element(self._at)
            yield element
            if element.word == "eof":
                break
        if self._at < len(self._data):
            at = self._at
            if self._number(1) != 6:
                raise Unreadable(f"{len(self._data) - at} bytes behind the end, at {at + self._base}")
            text = self._take(self._number(4))
            yield Element("description", at, self._at, payload=text)
            if self._at < len(self._data):
                raise Unreadable("bytes behind the description")

    def _element(self, at: int) -> Element:
        match self._number(1):
            case 0:
                return Element("eof", at, self._at)
            case 8:
                return self._command(at)
            case 1 | 2 | 3 | 4 as kind:
                return self._section(at, kind)
            case other:
                raise Unreadable(f"section type {other} at {at + self._base}")

    def _command(self, at: int) -> Element:
        number, length = self._number(2), self._number(2)
        payload = self._take(length)
        name = COMMANDS.get(number, f"command {number}")
        if name == "PING":
            return Element(f"PING {int.from_bytes(payload, 'big'):#x}", at, self._at, payload)
        if name == "DISCARD":
            return Element(f"DISCARD {payload[2 : 2 + payload[1]].decode()}", at, self._at, payload)
        if name == "PACKAGED":
            base, size = self._at + self._base, int.from_bytes(payload, "big")
            inside = _Reader(self._take(size), self._devices, self._footers, base)
            found = tuple(inside.stream(head=False, configuration=False))
            return Element(name, at, self._at, payload, inner=found)
        return Element(name, at, self._at, payload)

    def _section(self, at: int, kind: int) -> Element:
        number, name = self._number(4), "ram"
        blocks: list[tuple[str, int]] = []
        if kind in (1, 4):
            name = self._take(self._number(1)).decode()
            self._take(8)  # instance and version
        if kind == 4:
            if name not in self._devices:
                raise Unreadable(f"a device {name!r} at {at + self._base}")
            payload = self._take(self._devices[name])
            self._footer(number)
            return Element(f"full {name}", at, self._at, payload)
        if kind == 1:
            left = self._number(8)
            if left & 0xFFF != 4:
                raise Unreadable(f"no list of sizes at {at + self._base}")
            left &= ~0xFFF
            while left:
                block = self._take(self._number(1)).decode()
                blocks.append((block, self._number(8)))
                left -= blocks[-1][1]
            self._blocks = dict(blocks)
        pages = tuple(self.records())
        self._footer(number)
        return Element(f"{_KINDS[kind]} {name}", at, self._at, pages=pages, blocks=tuple(blocks))

    def records(self) -> Iterator[Page]:
        while True:
            at = self._at
            word = self._number(8)
            flags, offset = word & 0xFFF, word & ~0xFFF
            if flags == 0x10:
                return
            if not flags & 0x20:
                self._block = self._take(self._number(1)).decode()
            if flags & ~0x20 not in (2, 8):
                raise Unreadable(f"record with flags {flags:#x} at {at + self._base}")
            zero = bool(flags & 2)
            data = self._take(1) * PAGE if zero else self._take(PAGE)
            page = Page(self._block, offset // PAGE, zero, data)
            self._seen(page)
            yield page

    def _footer(self, number: int) -> None:
        if not self._footers:
            return
        at = self._at
        if self._number(1) != 0x7E or self._number(4) != number:
            raise Unreadable(f"no footer of section {number} at {at + self._base}")

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise Unreadable(f"the stream ends inside of {count} bytes at {self._at + self._base}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")


def ranges(discard: Element) -> list[tuple[int, int]]:
    """(first page, pages) of each range of a DISCARD."""
    raw = discard.payload[3 + discard.payload[1] :]
    return [(start // PAGE, length // PAGE) for start, length in struct.iter_unpack(">QQ", raw)]


@dataclasses.dataclass
class Memory:
    """What a destination has after some elements: the content, and which pages are there."""

    pages: dict[str, NDArray[np.uint8]] = dataclasses.field(default_factory=dict)
    here: dict[str, NDArray[np.bool_]] = dataclasses.field(default_factory=dict)
    #: Pages that came behind the package although they were there.
    twice: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    switched: bool = False

    def take(self, found: list[Element]) -> Memory:
        """Play *found*, in order."""
        for element in found:
            for name, length in element.blocks:
                self.pages[name] = np.zeros((length // PAGE, PAGE), np.uint8)
                self.here[name] = np.zeros(length // PAGE, np.bool_)
            for page in element.pages:
                self.put(page)
            if element.word.startswith("DISCARD"):
                block = element.word.split(" ", 1)[1]
                for first, count in ranges(element):
                    self.here[block][first : first + count] = False
            self.switched = self.switched or element.word == "PACKAGED"
        return self

    def put(self, page: Page) -> None:
        """One page has come."""
        if self.switched and self.here[page.block][page.number]:
            self.twice.append((page.block, page.number))
        self.pages[page.block][page.number] = np.frombuffer(page.data, np.uint8)
        self.here[page.block][page.number] = True
