"""The parts that fill a guest's memory: which pages are zero, what is marked as it comes, and where the stream then stands."""

from __future__ import annotations

import contextlib
import socket

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from trimig.engine.ram.marked import MarkedPages
from trimig.engine.ram.placement import ENOUGH, Target
from trimig.engine.ram.zeros import zero_pages
from trimig.guest import PAGE_SIZE
from trimig.memory import MemfdBlock
from trimig.wire import RecordWriter, Section
from trimig.wire import encoder as wire

LIMIT = 60
PAGES = 4 * ENOUGH


# -- zero pages ----------------------------------------------------------------------------------------------------------


def test_zero_pages_in_any_order() -> None:
    """Each answer belongs to the page at its place, also where the first and the last lie as in a run."""
    random = np.random.default_rng(11)
    pages = np.zeros((40, PAGE_SIZE), np.uint8)
    pages[random.random(40) < 0.4, -1] = 9  # begin with zeros, and are none
    pages[random.random(40) < 0.3, 0] = 7
    naive = np.array([not page.any() for page in pages])
    orders = [[0, 2, 1, 3], [4, 9, 2, 6, 8], [3], [7, 6, 5], list(range(40)), [5, 5, 6], [39, 0]]
    orders += [random.permutation(40)[: random.integers(1, 41)].tolist() for _ in range(200)]
    # A middle that is mixed, between ends that lie as in a run.
    orders += [[10, *random.permutation(np.arange(11, 19)).tolist(), 19] for _ in range(50)]
    for order in orders:
        assert zero_pages(pages, np.array(order, np.int64)).tolist() == naive[order].tolist(), order


# -- marks of pages that arrive ------------------------------------------------------------------------------------------


def taken(marks: MarkedPages) -> dict[str, list[int]]:
    """All that is marked."""
    found: dict[str, list[int]] = {}
    while (some := marks.take(3)) is not None:
        found.setdefault(some[0], []).extend(some[1].tolist())
    return found


def test_the_count_is_that_of_the_marked_pages() -> None:
    """By run or one by one, twice or once, and as they are taken away."""
    marks = MarkedPages({"ram": 5000 * PAGE_SIZE, "vga": 8 * PAGE_SIZE})
    marks.mark("ram", 10, 4)
    assert marks.count == 4
    marks.mark("ram", 12, 4)
    assert marks.count == 6
    marks.mark_each("ram", np.array([4999, 15, 16, 16, 3]))
    assert marks.count == 9
    marks.mark_each("vga", np.array([7]))
    marks.mark("vga", 7, 1)
    assert marks.count == 10
    assert marks.take(4) is not None
    assert marks.count == 6
    marks.mark("ram", 10, 1)
    assert marks.count == 7
    assert taken(marks) == {"ram": [10, 13, 14, 15, 16, 4999], "vga": [7]}
    assert marks.count == 0
    assert marks.take(1) is None


@pytest.mark.parametrize("touched", [False, True])
def test_pages_one_by_one_are_marked(*, touched: bool) -> None:
    with contextlib.closing(MemfdBlock("ram", 16 * PAGE_SIZE)) as block:
        target = Target(block)
        target.marks = MarkedPages({"ram": 16 * PAGE_SIZE})
        target.arrived_each(np.array([9, 2, 5]), touched=touched)
        assert target.marks.count == 3
        assert np.flatnonzero(target.received).tolist() == [2, 5, 9]
        assert taken(target.marks) == {"ram": [2, 5, 9]}


# -- where the stream stands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [0, 1, ENOUGH, 2 * ENOUGH + 1])
async def test_the_offset_behind_predicted_pages(behind: int) -> None:
    """An error behind pages that were placed past the decoder names the byte at which it is."""
    size = PAGES * PAGE_SIZE
    head = wire.file_header() + wire.configuration("m", ())
    head += wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", size)])
    head += wire.END_WORD + wire.section_footer(2) + wire.section_continue(Section.PART, 2)
    random = np.random.default_rng(5)
    data = random.integers(1, 256, (ENOUGH + 8 + behind, PAGE_SIZE), np.uint8)
    offsets = np.arange(len(data), dtype=np.int64) * PAGE_SIZE
    records = bytes(RecordWriter().page_records("ram", offsets, data))
    first = len(head) + 8 + 4 + (ENOUGH + 2) * (8 + PAGE_SIZE)
    stream = head + records
    wrong = (7 * size | 0x28).to_bytes(8)  # far behind the block
    a, b = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    guest = trimig.AppGuest("m", running=False)
    guest.add_ram("ram", size)
    ends: list[trimig.TrimigError] = []

    async def receive() -> None:
        with pytest.raises(trimig.RemoteProtocolError) as error:
            await trimig.receive(guest, b)
        ends.append(error.value)

    with guest, trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await a.send_all(stream[:first])
            while not guest.ram[0].pages[ENOUGH - 1].any():  # noqa: ASYNC110 - there is no event for a page
                await trio.sleep(0.001)
            await a.send_all(stream[first:] + wrong + bytes(PAGE_SIZE))
            await a.aclose()
        assert (guest.ram[0].pages[: len(data)] == data).all()
    (error,) = ends
    assert isinstance(error, trimig.RemoteProtocolError)
    assert error.offset == len(stream)


# -- predictions that are right and wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_sections_of_usual_and_of_other_lengths(seed: int, *, cold: bool) -> None:
    """Runs that end where the last one did, before it and behind it, in zero pages, in other pages and in other sections.

    Some are long enough for a thread. All pages come, as they were sent last.
    """
    random = np.random.default_rng(seed)
    pages = 6000
    size = pages * PAGE_SIZE
    memory = random.integers(1, 256, (pages, PAGE_SIZE), np.uint8)
    writer = RecordWriter()
    head = wire.file_header() + wire.configuration("m", ())
    head += wire.section_start(Section.START, 2, "ram", 0, 4) + wire.ram_list([("ram", size)])
    parts = [head + wire.END_WORD + wire.section_footer(2)]
    first = 0
    while first < pages:
        run = int(random.choice((700, 700, 700, ENOUGH, ENOUGH + 3, 1500, 3)))
        kind = str(random.choice(("section", "section", "zeros", "twice")))
        offsets = np.arange(first, min(first + run, pages), dtype=np.int64) * PAGE_SIZE
        parts.append(wire.section_continue(Section.PART, 2))
        parts.append(bytes(writer.page_records("ram", offsets, memory[first : first + len(offsets)])))
        first += len(offsets)
        if kind == "zeros" and first + 5 <= pages:
            memory[first : first + 5] = 0
            parts.append(bytes(writer.zero_records("ram", np.arange(first, first + 5, dtype=np.int64) * PAGE_SIZE)))
            first += 5
        elif kind == "twice":
            again = np.array([int(random.integers(0, first))])
            memory[again] ^= 0xFF
            parts.append(bytes(writer.page_records("ram", again * PAGE_SIZE, memory[again])))
        parts.append(wire.END_WORD + wire.section_footer(2))
    parts.append(wire.section_continue(Section.END, 2) + wire.END_WORD + wire.section_footer(2))
    parts.append(b"\xff")  # no element: an error says where
    stream = b"".join(parts)
    a, b = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    guest = trimig.AppGuest("m", running=False)
    guest.add_ram("ram", size)
    if not cold:
        guest.ram[0].pages[:] = 0
    with guest, trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                left = memoryview(stream)
                while len(left):
                    count = int(random.integers(1, 1 << 20))
                    await a.send_all(left[:count])
                    left = left[count:]

            nursery.start_soon(send)
            with pytest.raises(trimig.RemoteProtocolError) as error:
                await trimig.receive(guest, b)
        assert error.value.offset == len(stream) - 1
        assert (guest.ram[0].pages == memory).all()
        await a.aclose()
