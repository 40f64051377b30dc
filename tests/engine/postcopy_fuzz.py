"""Sources that break the rules behind the switch to postcopy, from a seed, and a destination that must bear them.

A script is a whole migration by postcopy, in blocks and pages of any order, on one connection or two. Some scripts are
spoiled: something is put in, cut off, or changed. Whatever comes, the destination keeps what it has; a sound recovery makes
its guest whole; and the memory is that of :mod:`tests.reading`, which has read the same bytes on its own.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import struct
from typing import Any

import numpy as np
import trio
import trio.testing

import trimig
from tests.reading import PAGE, Memory, Page, Unreadable, reader
from trimig.channel.channel import AnyStream
from trimig.channel.connections import Connections
from trimig.engine.destination import receive_stream
from trimig.monitor.core import MonitorCore
from trimig.status import Status
from trimig.testing import FakeDevice, LazyScriptedGuest, VirtualStream, virtual_link

BLOCKS = (("ram", 24), ("b2", 3), ("rom", 1))
#: A virtual hour: nothing may hang.
LIMIT = 3600.0


# -- writing, in bytes ---------------------------------------------------------------------------------------------------


def be32(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value & (2**64 - 1))


def cstr(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def command(number: int, payload: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(payload)) + payload


def section(records: bytes, kind: int = 2, number: int = 2) -> bytes:
    return bytes([kind]) + be32(number) + records + be64(0x10) + b"\x7e" + be32(number)


def device(name: str, payload: bytes, number: int) -> bytes:
    return b"\4" + be32(number) + cstr(name) + be32(0) + be32(1) + payload + b"\x7e" + be32(number)


def discard(block: str, pages: list[int]) -> bytes:
    ranges = b"".join(be64(page * PAGE) + be64(PAGE) for page in pages)
    return command(6, b"\0" + cstr(block) + b"\0" + ranges)


def content(block: str, page: int, version: int) -> bytes:
    """4096 bytes that say what they are; one page of five is zero, another of one byte."""
    chosen = random.Random(f"{block} {page} {version}")
    match chosen.randrange(5):
        case 0:
            return bytes(PAGE)
        case 1:
            return bytes([chosen.randrange(1, 256)]) * PAGE
    return chosen.randbytes(16) * (PAGE // 16)


def records(chosen: random.Random, pages: list[tuple[str, int]], version: int) -> bytes:
    """Page records, with the name of the block where it is needed, and sometimes where it is not."""
    out, last = [], ""
    for block, page in pages:
        data = content(block, page, version)
        named = block != last or chosen.random() < 0.1
        flags, last = 0 if named else 0x20, block
        name = cstr(block) if named else b""
        if data == data[:1] * PAGE and chosen.random() < 0.9:
            out.append(be64(page * PAGE | flags | 2) + name + data[:1])
        else:
            out.append(be64(page * PAGE | flags | 8) + name + data)
    return b"".join(out)


def sections(chosen: random.Random, pages: list[tuple[str, int]], version: int) -> list[bytes]:
    """Those pages in sections of some length."""
    out = []
    while pages:
        count = chosen.choice((1, 2, 5, 30))
        out.append(section(records(chosen, pages[:count], version)))
        pages = pages[count:]
    return out


END = section(b"", kind=3) + b"\0"


def any_pages(chosen: random.Random) -> list[tuple[str, int]]:
    """All pages, in one of three orders."""
    pages = [(block, page) for block, count in BLOCKS for page in range(count)]
    match chosen.randrange(3):
        case 0:
            chosen.shuffle(pages)
        case 1:
            pages.reverse()
    return pages


@dataclasses.dataclass
class Script:
    """What a source says."""

    before: bytes  # up to the package, with it
    behind: list[bytes]  # on the main connection
    beside: list[bytes]  # on the second one
    spoiled: bool = False

    @classmethod
    def made(cls, chosen: random.Random, *, preempt: bool) -> Script:
        """A sound one."""
        blocks = list(BLOCKS)
        chosen.shuffle(blocks)
        listed = be64(sum(count for _, count in blocks) * PAGE | 4)
        listed += b"".join(cstr(name) + be64(count * PAGE) for name, count in blocks)
        head = b"QEVM\0\0\0\3\7" + be32(8) + b"scripted" + command(1) + command(2, be32(1)) + command(3, be64(PAGE) * 2)
        head += b"\1" + be32(2) + cstr("ram") + be32(0) + be32(4) + listed + be64(0x10) + b"\x7e" + be32(2)
        early = [page for page in any_pages(chosen) if chosen.random() < 0.6]
        stale = [page for page in early if chosen.random() < 0.3]
        here = set(early) - set(stale)
        body = b"".join(sections(chosen, early, 1))
        for block, _ in blocks:
            pages = sorted(page for name, page in stale if name == block)
            for first in range(0, len(pages), 12):
                body += discard(block, pages[first : first + 12])
        state = be32(8) + b"running".ljust(100, b"\0")
        blob = (
            command(4)
            + device("clock", be64(77), 5)
            + device("globalstate", state, 6)
            + command(2, be32(3))
            + command(5)
        )
        body += command(2, be32(2)) + command(7, be32(len(blob))) + blob
        rest = [page for page in any_pages(chosen) if page not in here]
        urgent = [page for page in rest if preempt and chosen.random() < 0.4]
        main = [page for page in rest if page not in urgent]
        return cls(head + body, [command(2, be32(4)), *sections(chosen, main, 2)], cls._beside(chosen, urgent))

    @staticmethod
    def _beside(chosen: random.Random, pages: list[tuple[str, int]]) -> list[bytes]:
        """Records without sections; each begins with its name."""
        return [records(chosen, [page], 2) for page in pages]

    def spoil(self, chosen: random.Random) -> None:
        """Break a rule, or seem to."""
        self.spoiled = True
        at = chosen.randrange(len(self.behind) + 1)
        match chosen.randrange(5):
            case 0 | 1:
                self.behind.insert(at, surprise(chosen))
            case 2:
                self.behind[at:] = [b"".join(self.behind[at:])[: chosen.randrange(5000)]]
            case 3:
                self.behind = [flipped(chosen, b"".join(self.behind))]
            case _:
                chosen.shuffle(self.behind)
                self.behind += self.behind[: chosen.randrange(3)]
        if self.beside and chosen.random() < 0.3:
            self.beside = [flipped(chosen, b"".join(self.beside))]


def surprise(chosen: random.Random) -> bytes:
    """Something that has no place behind the switch, or is harmless in spite of its looks."""
    block, count = chosen.choice(BLOCKS)
    page = chosen.randrange(count)
    far = chosen.choice((count * PAGE, 1 << 40, 1 << 63, 2**64 - PAGE))
    everything = (
        section(records(chosen, [(block, page)], 2)), section(b""), section(b"", kind=3), section(b"", number=chosen.choice((0, 3, 99))),
        section(be64(far | 8) + cstr(block) + bytes(PAGE)), section(be64(far | 2) + cstr(block) + b"\0"),
        section(be64(2) + cstr("absent") + b"\0"), section(be64(0x22) + b"\0"), section(be64(page * PAGE | 4)),
        section(be64(page * PAGE | chosen.choice((1, 0x40, 0x80, 0x100, 0x18, 0x0A)))), section(be64(chosen.getrandbits(64))),
        command(1), command(2, be32(chosen.getrandbits(32))), command(2, be32(3)) * 50, command(2), command(3, be64(PAGE) * 2),
        command(4), command(5), command(7, be32(0)), command(7, be32(2**32 - 1)), discard(block, [page]), command(9),
        command(10, cstr(block)), command(10, b"\xff"), command(chosen.randrange(65536), chosen.randbytes(chosen.randrange(40))),
        device("clock", be64(1), 5), device("ghost", be64(1), 9), b"\x7e" + be32(2), b"\0", b"\0" * 30, b"QEVM\0\0\0\3",
        chosen.randbytes(chosen.randrange(1, 200)),
    )  # fmt: skip
    return chosen.choice(everything)


def flipped(chosen: random.Random, data: bytes) -> bytes:
    """Some bytes of it are others."""
    changed = bytearray(data)
    for _ in range(chosen.choice((1, 1, 2, 5))):
        if not changed:
            break
        at = chosen.randrange(len(changed))
        match chosen.randrange(4):
            case 0:
                changed[at] ^= 1 << chosen.randrange(8)
            case 1:
                del changed[at : at + chosen.choice((1, 2, 8, PAGE))]
            case 2:
                changed[at:at] = chosen.randbytes(chosen.randrange(1, 10))
            case _:
                changed[at : at + 8] = be64(chosen.choice((0, PAGE, 0x10, 1 << 63, 2**64 - 1)))
    return bytes(changed)


# -- the destination under test ------------------------------------------------------------------------------------------


def waiting(chosen: random.Random) -> LazyScriptedGuest:
    """A guest whose blocks are in an order of its own, and which touches a few pages."""
    blocks = list(BLOCKS)
    chosen.shuffle(blocks)
    first = blocks[0][1]
    touches = [chosen.randrange(first) for _ in range(chosen.randrange(5))]
    return LazyScriptedGuest(
        blocks=dict(blocks),
        content="random",
        seed=5,
        run_state="inmigrate",
        devices=[FakeDevice("clock", size=8)],
        touches=touches,
    )


def able(*, preempt: bool) -> trimig.Config:
    return trimig.Config(
        capabilities=trimig.Capabilities(postcopy_ram=True, postcopy_preempt=preempt),
        peer=dataclasses.replace(trimig.PeerProfile(), suppress_vmdesc=True),
        handover_timeout=2.0, teardown_grace=1.0, stall_timeout=5.0, recovery_timeout=600.0,
    )  # fmt: skip


class Heard:
    """The return path, read by an own reader: bitmaps, PONGs, RESUME_ACK, SHUT."""

    def __init__(self, stream: VirtualStream) -> None:
        self._stream = stream
        self._data = bytearray()
        self.pongs: list[int] = []
        self.shuts: list[int] = []
        self.acks = 0
        self.bitmaps: dict[str, Any] = {}
        self.closed = False
        self._news = trio.Event()

    async def run(self) -> None:
        """To the end."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._stream.receive_some(65536):
                self._data += data
                self._take()
        self.closed = True
        self._news.set()

    def _take(self) -> None:
        while len(self._data) >= 4:
            kind, length = struct.unpack_from(">HH", self._data)
            end = 4 + length
            payload = bytes(self._data[4:end])
            if kind == 5 and len(payload) == length:
                count = dict(BLOCKS)[payload[1:].decode()]
                end += 8 + (count + 63) // 64 * 8 + 8
            if len(self._data) < end:
                return
            match kind:
                case 1:
                    self.shuts.append(int.from_bytes(payload, "big"))
                case 2:
                    self.pongs.append(int.from_bytes(payload, "big"))
                case 5:
                    bits = np.frombuffer(bytes(self._data[4 + length + 8 : end - 8]), np.uint8)
                    self.bitmaps[payload[1:].decode()] = np.unpackbits(bits, bitorder="little")[:count].astype(bool)
                case 6:
                    self.acks += 1
            del self._data[:end]
        self._news.set()
        self._news = trio.Event()

    async def until(self, what: Any) -> bool:
        """Wait for that, or for the end; whether it has come."""
        while not what() and not self.closed:
            await self._news.wait()
        return bool(what())


class Fuzzed:
    """One script against one destination."""

    def __init__(self, seed: int, *, preempt: bool, spoiled: float = 0.7) -> None:
        self.chosen = random.Random(seed)
        self.preempt = preempt
        self.guest = waiting(self.chosen)
        self.monitor = MonitorCore()
        self.script = Script.made(self.chosen, preempt=preempt)
        if self.chosen.random() < spoiled:
            self.script.spoil(self.chosen)
        self.model = Memory()
        self.either: dict[tuple[str, int], bytes] = {}
        self._block = ""
        self._twice = False
        self.end: trimig.Summary | trimig.TrimigError | None = None
        self.recoveries = 0
        self._main, self._mains = trio.open_memory_channel[AnyStream](9)
        self._second, self._seconds = trio.open_memory_channel[AnyStream](9)

    async def _next(self, _: str | None = None) -> AnyStream:
        return await self._mains.receive()

    async def _receive(self) -> None:
        ways = Connections(first=self._next, again=self._next, beside=self._seconds.receive)
        try:
            self.end = await receive_stream(self.guest, ways, able(preempt=self.preempt), self.monitor)
        except trimig.TrimigError as error:
            self.end = error

    async def run(self) -> str:
        """The whole of it; returns a word for how it went, raises AssertionError for what must not be."""
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._receive)
                await self._first(nursery)
                while self.monitor.status is Status.POSTCOPY_PAUSED:
                    assert self.recoveries < 9, "it is paused again and again"
                    await self._recover(nursery, sound=self.recoveries > 1 or self.chosen.random() < 0.5)
        return self._judge()

    async def _first(self, nursery: trio.Nursery) -> None:
        ours, theirs = virtual_link()
        await self._main.send(theirs)
        heard = Heard(ours)
        nursery.start_soon(heard.run)
        if self.preempt:
            near, far = virtual_link()
            await self._second.send(far)
            nursery.start_soon(Heard(near).run)
        await ours.send_all(self.script.before)
        self._play(self.script.before, head=True)
        assert await heard.until(lambda: 3 in heard.pongs), f"the guest does not live: {self.end!r}"
        sent = [b"".join(self.script.behind)]
        if self.preempt:
            nursery.start_soon(self._say, near, b"".join(self.script.beside) + be64(0x10), False)
        if not self.script.spoiled:
            sent.append(END)
        await self._say(ours, b"".join(sent), True)
        self._play(b"".join(sent), head=False)
        if self.preempt:
            self._play_records(b"".join(self.script.beside))
        await self._until_still()

    async def _say(self, stream: VirtualStream, data: bytes, end: bool) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(data)
            if end:
                await stream.send_eof()

    async def _until_still(self) -> None:
        while self.end is None and self.monitor.status is not Status.POSTCOPY_PAUSED:  # noqa: ASYNC110 - time is virtual
            await trio.sleep(0.01)

    def _play(self, data: bytes, *, head: bool) -> None:
        """What an own reading makes of it, page by page up to the first byte that makes no sense."""
        with contextlib.suppress(Unreadable, IndexError, KeyError, UnicodeDecodeError):
            for element in reader(data, {"clock": 8}, self._see, self._block).stream(head=head, configuration=head):
                if self._twice or (self.model.switched and element.word.startswith("DISCARD")):
                    break
                self.model.take([dataclasses.replace(element, pages=())])

    def _play_records(self, data: bytes) -> None:
        with contextlib.suppress(Unreadable, IndexError, KeyError, UnicodeDecodeError):
            for _ in reader(data + be64(0x10), {}, self._see_beside).records():
                pass

    def _see_beside(self, page: Page) -> None:
        """Of a page that comes on both connections either may be the first."""
        if self.model.here[page.block][page.number]:
            self.either[page.block, page.number] = page.data
        else:
            self.model.put(page)

    def _see(self, page: Page) -> None:
        self._block = page.block
        if self.model.switched and self.model.here[page.block][page.number]:
            # The end, but records of one kind are gathered: what follows in this section may be taken before it is seen.
            self._twice = True
            return
        self.model.put(page)

    async def _recover(self, nursery: trio.Nursery, *, sound: bool) -> None:
        """Take it up again, soundly or not. Before that: what is here is what the model has."""
        self.recoveries += 1
        self._compare()
        self.monitor.recover("again")
        ours, theirs = virtual_link()
        await self._main.send(theirs)
        heard = Heard(ours)
        nursery.start_soon(heard.run)
        if self.preempt:
            near, far = virtual_link()
            await self._second.send(far)
            nursery.start_soon(Heard(near).run)
        asked = b"".join(command(10, cstr(block)) for block, _ in BLOCKS)
        if not sound:
            await self._say(ours, self._nonsense(asked), True)
            await heard.until(lambda: False)
            await self._until_still()
            return
        with contextlib.suppress(trio.BrokenResourceError):
            await ours.send_all(asked)
        if not await heard.until(lambda: len(heard.bitmaps) == len(BLOCKS)):
            await self._until_still()
            return
        missing = []
        for block, _ in BLOCKS:
            assert np.array_equal(~heard.bitmaps[block], self._gone(block)), f"{block}: the bitmap is not the memory"
            missing += [(block, int(page)) for page in np.flatnonzero(~heard.bitmaps[block])]
        self.chosen.shuffle(missing)
        rest = b"".join(sections(self.chosen, missing, 3))
        for block, page in missing:
            self.model.pages[block][page] = np.frombuffer(content(block, page, 3), np.uint8)
            self.model.here[block][page] = True
        with contextlib.suppress(trio.BrokenResourceError):
            await ours.send_all(command(9))
        assert await heard.until(lambda: heard.acks), "RESUME was not answered"
        await self._say(ours, rest + END, False)
        await heard.until(lambda: heard.shuts)
        assert heard.shuts == [0], f"{heard.shuts} {self.end!r} {self.monitor.info()}"
        await ours.aclose()
        await self._until_still()

    def _nonsense(self, asked: bytes) -> bytes:
        """A handshake that is none. It brings no page."""
        chosen = self.chosen
        return chosen.choice(
            (
                b"", asked[: chosen.randrange(len(asked))], command(9) + command(9), command(10, cstr("absent")), command(10),
                command(10, b"\3ra"), b"QEVM\0\0\0\3", asked + command(9, b"x"), asked + command(4), asked + command(7, be32(5)),
                flipped(chosen, asked), asked + chosen.randbytes(30), asked + asked + command(5), command(2, be32(1)) * 3,
            )
        )  # fmt: skip

    def _gone(self, block: str) -> Any:
        return next(b.gone for b in self.guest.ram if b.name == block)

    def _compare(self) -> None:
        """What is here came, and is as it came."""
        for block in self.guest.ram:
            here = ~block.gone
            assert not (here & ~self.model.here[block.name]).any(), f"{block.name}: pages that never came"
            wrong = np.flatnonzero(here & (block.pages != self.model.pages[block.name]).any(axis=1)).tolist()
            wrong = [page for page in wrong if self.either.get((block.name, page)) != block.pages[page].tobytes()]
            assert not wrong, f"{block.name}: other content in {wrong}"

    def _judge(self) -> str:
        assert not self.guest.misuse, self.guest.misuse
        assert not self.guest.overwritten, f"placed twice: {self.guest.overwritten}"
        assert self.guest.claimed is None
        assert isinstance(self.end, trimig.Summary), f"{self.end!r}"
        assert self.monitor.status is Status.COMPLETED
        assert self.guest.running
        self._compare()
        assert all(here.all() for here in self.model.here.values()), "it is complete, and its memory is not"
        assert not self.guest.touches, "the guest still waits"
        return f"{'spoiled' if self.script.spoiled else 'sound'}, {self.recoveries} recoveries"


def fuzz(seeds: range, *, preempt: bool) -> collections.Counter[str]:
    """How often each way to the end was taken; AssertionError with the seed for what must not be."""
    ways: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        try:
            ways[trio.run(one, seed, preempt, clock=trio.testing.MockClock(autojump_threshold=0))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, preempt {preempt}")
            raise
    return ways


async def one(seed: int, preempt: bool) -> str:
    """One input."""
    return await Fuzzed(seed, preempt=preempt).run()
