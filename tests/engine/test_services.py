"""What one thread does on each side in postcopy, driven by hand: scripted streams, no thread, no descriptor that is read."""

from __future__ import annotations

import collections
import math
import select
import socket
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import trio

from trimig.channel.channel import Channel
from trimig.channel.return_path import ReturnPathReader
from trimig.engine.destination.pages import PageService, ReadsNow
from trimig.engine.ram.postcopy_receiver import TURN_PAGES, PostcopyReceiver
from trimig.engine.ram.records import PageSender
from trimig.engine.ram.sending import Growing, Outlet, PageSending
from trimig.errors import RemoteProtocolError, TransportFailed
from trimig.guest import PAGE_SIZE, Pages, Wait
from trimig.monitor.statistics import Counters
from trimig.policy.page_order import PageOrder
from trimig.status import ReturnPath
from trimig.wire import Command, Section
from trimig.wire import encoder as wire
from trimig.wire import events as ev
from trimig.wire.return_path import PageRequest, Pong, Shut, encode

COUNT = 8 * TURN_PAGES


# -- the destination -------------------------------------------------------------------------------------------------------


class Memory:
    """Notes what is placed; the guest touches *touched*."""

    def __init__(self) -> None:
        self.touched: list[int] = []
        #: Touched once so many pages are placed.
        self.touched_later: dict[int, int] = {}
        self.placed: list[int] = []

    def fileno(self) -> int:
        return 100

    def waits(self) -> list[Wait]:
        touched, self.touched = self.touched, []
        return [Wait(block=0, page=page, thread=1) for page in touched]

    def place(self, block: int, first: int, pages: Pages) -> int:
        assert block == 0
        assert pages[:, 0].tolist() == [page % 251 for page in range(first, first + len(pages))]
        self.placed += range(first, first + len(pages))
        if (page := self.touched_later.get(len(self.placed))) is not None:
            self.touched.append(page)
        return len(pages)

    def place_zeros(self, block: int, first: int, count: int) -> int:
        self.placed += range(first, first + count)
        return count

    def close(self) -> None:
        raise AssertionError("the memory is closed by the engine")


class Line:
    """A connection of which only numbers are looked at."""

    descriptor = 200
    received = 0
    stall_timeout = 5.0


class Arriving:
    """A stream whose reads are a script: the elements that each read brings."""

    def __init__(self, *reads: list[ev.Element]) -> None:
        self.channel = Line()
        self._reads = list(reads)
        self._elements: list[ev.Element] = []

    def next_now(self) -> ev.Element | None:
        return self._elements.pop(0) if self._elements else None

    def read_now(self) -> bool:
        if not self._reads:
            return False
        self._elements = self._reads.pop(0)
        return True


def run_of(*pages: int) -> ev.PageRun:
    data = np.zeros((len(pages), PAGE_SIZE), np.uint8)
    data[:, 0] = np.array(pages) % 251
    return ev.PageRun(block="ram", named=True, offsets=np.array(pages, np.int64) * PAGE_SIZE, data=data)


class Serving:
    """A service, and what it has asked for."""

    def __init__(self, *reads: list[ev.Element], takes: float = math.inf) -> None:
        self.memory = Memory()
        self.asked = b""
        #: How many pages were placed at each request.
        self.asked_at: list[int] = []
        self._takes = takes
        received = {"ram": np.zeros(COUNT, np.bool_)}
        self.receiver = PostcopyReceiver(self.memory, ["ram"], received, self._unused, Counters())
        self.service = PageService(self.receiver, cast(ReadsNow, Arriving(*reads)), self._say)

    async def _unused(self, data: bytes) -> None:
        raise AssertionError("requests are sent without waiting")

    def _say(self, data: bytes) -> bytes:
        taken = int(min(self._takes, len(data)))
        self.asked += data[:taken]
        self.asked_at.append(len(self.memory.placed))
        return data[taken:]


def asks(page: int, *, named: bool = True) -> bytes:
    return encode(PageRequest(block="ram", start=page * PAGE_SIZE, length=PAGE_SIZE, named=named))


def test_nothing_to_do_waits_for_the_guest_and_the_connection() -> None:
    awaited = Serving().service.advance()
    assert awaited is not None
    assert dict(awaited.ports) == {100: select.POLLIN, 200: select.POLLIN}
    assert (awaited.busy, awaited.seconds) == (False, 5.0)


def test_a_fault_is_asked_for_once_before_pages_are_placed() -> None:
    there = Serving([run_of(*range(TURN_PAGES))])
    there.memory.touched = [3, 70, 3]
    assert there.service.advance() is not None
    assert there.asked == asks(3) + asks(70, named=False)
    assert there.memory.placed == list(range(TURN_PAGES))


def test_a_fault_between_two_turns_is_asked_for_before_the_next_one() -> None:
    """The request does not wait until all pages that were read are placed."""
    there = Serving([run_of(*range(2 * TURN_PAGES))])
    there.memory.touched_later = {TURN_PAGES: 200}
    there.service.advance()
    assert there.memory.placed == list(range(2 * TURN_PAGES))
    assert there.asked == asks(200)
    assert there.asked_at == [TURN_PAGES]


def test_an_element_that_is_no_page_is_left_when_all_pages_before_it_are_placed() -> None:
    ping = ev.CommandElement(number=Command.PING, payload=bytes(4))
    there = Serving([run_of(5, 6), ev.RamEnd(), ev.SectionFooter(section_id=2), ping, run_of(7)])
    there.memory.touched = [100]
    assert there.service.advance() is None
    assert there.service.event is ping
    assert there.memory.placed == [5, 6]
    there.service.begin(None)
    there.service.advance()
    assert there.memory.placed == [5, 6, 7]


def test_the_rest_of_a_request_that_the_kernel_does_not_take_is_left() -> None:
    there = Serving(takes=5)
    there.memory.touched = [9]
    assert there.service.advance() is None
    assert there.asked + there.service.unsent == asks(9)


def test_a_page_that_comes_a_second_time_is_refused() -> None:
    there = Serving([run_of(5)], [run_of(4, 5)])
    with pytest.raises(RemoteProtocolError, match="page 5 of RAM block 'ram' came a second time"):
        collections.deque(iter(there.service.advance, None), maxlen=0)


# -- the source ------------------------------------------------------------------------------------------------------------


class Source:
    """A service of the source on real sockets, which nothing waits for."""

    def __init__(self, pages: int, *, beside: bool) -> None:
        self.memory = np.random.default_rng(1).integers(1, 255, (pages, PAGE_SIZE)).astype(np.uint8)
        self.order = PageOrder([np.ones(pages, np.bool_)])
        self.ends: list[socket.socket] = []
        self.main, self.far = self._connection()
        self.reader = ReturnPathReader(self.main, {"ram": pages * PAGE_SIZE})
        self.told: list[object] = []
        self.reader.enter(ReturnPath.FOLLOWING, self.told.append)
        growing = Growing(beside=beside)
        urgent = None
        if beside:
            channel, self.far_urgent = self._connection()
            urgent = self._outlet(channel)
        self.sending = PageSending(self.reader, self._note, self.order, growing, self._outlet(self.main), urgent)

    def _connection(self) -> tuple[Channel, socket.socket]:
        near, far = socket.socketpair()
        far.setblocking(False)
        self.ends = [*self.ends, near, far]
        return Channel(trio.SocketStream(trio.socket.from_stdlib_socket(near))), far

    def _outlet(self, channel: Channel) -> Outlet:
        records = PageSender(channel, Counters())

        def plan(block: str, pages: Pages, indices: np.ndarray) -> object:
            return records.plan(b"", block, pages, indices)

        return Outlet(channel, [("ram", self.memory)], plan, lambda _: None)  # type: ignore[arg-type]

    def _note(self, message: PageRequest) -> None:
        self.order.request(0, message.start // PAGE_SIZE, message.length // PAGE_SIZE)


@pytest.fixture
def there(request: pytest.FixtureRequest) -> Iterator[Source]:
    """With ``(pages, beside)`` as parameter, else 64 pages and one connection."""
    pages, beside = getattr(request, "param", (64, False))
    made = Source(pages, beside=beside)
    yield made
    for end in made.ends:
        end.close()


def offsets(data: bytes) -> Iterator[int]:
    """The page of each whole record; the first has the block's name."""
    at = 0
    while at < len(data):
        word = int.from_bytes(data[at : at + 8])
        at += 8 + (0 if word & 0x20 else 4) + PAGE_SIZE
        yield word >> 12


async def test_a_request_goes_before_the_background(there: Source) -> None:
    there.far.send(asks(40))
    there.sending.allow(math.inf)
    for _ in range(3):
        there.sending.advance()
    sent = list(offsets(there.far.recv(1 << 20)))
    assert sent[:2] == [40, 41]


@pytest.mark.parametrize("there", [(64, True)], indirect=True)
async def test_with_a_second_connection_the_request_goes_on_it_alone(there: Source) -> None:
    there.far.send(asks(40))
    awaited = there.sending.advance()
    assert awaited is not None
    assert list(offsets(there.far_urgent.recv(1 << 20))) == [40]
    with pytest.raises(BlockingIOError):
        there.far.recv(1)
    assert not awaited.ports[there.main.descriptor] & select.POLLOUT  # nothing of the background is allowed


@pytest.mark.parametrize("there", [(400, False)], indirect=True)
async def test_an_allowance_is_spent_also_where_the_socket_was_full(there: Source) -> None:
    """Otherwise the thread would wait for a message that never comes."""
    there.sending.allow(300)
    received = b""
    while (awaited := there.sending.advance()) is not None:
        assert awaited.ports[there.main.descriptor] & select.POLLOUT
        received += there.far.recv(1 << 14)
    while len(received) < there.main.sent:
        received += there.far.recv(1 << 20)
    assert len(list(offsets(received))) == 300
    assert there.order.remaining == 100


async def test_other_messages_are_left_to_trio_in_their_order(there: Source) -> None:
    there.far.send(asks(9) + encode(Pong(value=3)) + asks(8, named=False) + encode(Shut(status=0)))
    assert there.sending.advance() is None
    assert there.told == []
    assert there.order.urgent
    there.reader.take_kept()
    assert [type(message) for message in there.told] == [Pong, PageRequest, Shut]
    assert there.reader.shut == 0


@pytest.mark.parametrize("what", ["end", "nonsense"])
async def test_an_ended_or_malformed_return_path_is_lost(what: str, there: Source) -> None:
    there.far.send(asks(9))
    if what == "end":
        there.far.shutdown(socket.SHUT_WR)
    else:
        there.far.send(b"\xff" * 64)
    while there.sending.advance() is not None:
        pass
    there.reader.take_kept()
    assert isinstance(there.reader.lost, TransportFailed if what == "end" else RemoteProtocolError)
    assert there.told[-1] is None


@pytest.mark.parametrize("there", [(400, False)], indirect=True)
async def test_a_plan_that_is_given_up_poisons_the_channel_and_what_left_is_counted(there: Source) -> None:
    there.ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    there.far.send(encode(PageRequest(block="ram", start=0, length=400 * PAGE_SIZE)))
    there.sending.advance()
    there.main.end_sending()
    assert there.main.poisoned
    received = b""
    while len(received) < there.main.sent:
        received += there.far.recv(1 << 20)
    assert len(received) == there.main.sent
    with pytest.raises(BlockingIOError):
        there.far.recv(1)


async def test_a_closed_stream_is_a_lost_connection(there: Source) -> None:
    await there.main.stream.aclose()
    assert there.sending.advance() is None
    there.reader.take_kept()
    assert "the stream was closed here" in str(there.reader.lost)


def test_the_plan_of_a_batch_is_what_send_would_send() -> None:
    """Zero pages first, then the others with the name once."""
    memory = np.zeros((4, PAGE_SIZE), np.uint8)
    memory[[1, 3]] = 7
    plan = PageSender(cast(Channel, None), Counters()).plan(
        wire.section_continue(Section.PART, 2), "ram", memory, np.arange(4)
    )
    assert plan.left == 5 + (9 + 4) + 9 + 2 * (8 + PAGE_SIZE)
