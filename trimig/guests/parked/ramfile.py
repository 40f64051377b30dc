"""RAM in a file, as sections of a plain stream: each page is there once, even if it is received several times.

The records of a block stand in *slots* of equal size. A slot holds the record of one page with data, or the records of a
*group* of zero pages: a ZERO record has 9 bytes, a PAGE record 4104, so 456 ZERO records have exactly the size of one
PAGE record.

* A page that is received for the first time gets the next slot, at the end of the file.
* A page that is received again overwrites its slot, also if it holds zeros now.
* A page of a group that holds data now takes the slot of the whole group. The other pages of the group wait for a new
  slot.

So no page is in the file twice, no padding is needed, and the work for the last pages does not depend on the number of
zero pages.

The first record after a section's head names the block, all others say "the same block": a run of slots is one section,
and only the section at the end of the file grows. The order of the slots does not matter to a reader.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...channel.vectored import MAX_ELEMENTS, Records, writev
from ...engine.ram.sender import RAM_SECTION
from ...engine.ram.zeros import zero_pages
from ...guest import PAGE_SIZE, PageBitmap
from ...wire import encoder as wire
from ...wire.constants import RamFlag, Section
from ...wire.encoder import RecordWriter

if TYPE_CHECKING:
    from ...memory.block import MemfdBlock

Indices = NDArray[np.int64]

_WORD: Final = 8
_ZERO_RECORD: Final = 9
#: Size of a slot in bytes.
SLOT: Final = _WORD + PAGE_SIZE
#: Zero pages whose records fill one slot.
GROUP: Final = SLOT // _ZERO_RECORD
assert GROUP * _ZERO_RECORD == SLOT

#: Pages of one vectored write.
_GATHER: Final = MAX_ELEMENTS // 2

# Special entries in a block's table of pages. Every other entry is the position of the page's slot in the file,
# negative if the slot holds a group. No slot begins at 0 or 1, because a header is before it.
_NONE: Final = 0
_WAITS: Final = -1


class RamWriter:
    """Writes the RAM of a guest into a file.

    All methods are blocking functions; only one thread at a time may call them. After an error the file is unusable.

    Args:
        fd: open for reading and writing; its offset is moved.
        start: position of the first section.
        blocks: the blocks to write. The memory may change while it is read; a changed page has to be written again.
        footer: bytes of the footer after each section.
    """

    def __init__(self, fd: int, start: int, blocks: Sequence[MemfdBlock], footer: bytes) -> None:
        self._fd = fd
        self._blocks = tuple(blocks)
        self._footer = footer
        self._tables = tuple(np.zeros(block.length // PAGE_SIZE, np.int64) for block in blocks)
        self._waiting: list[Indices] = [np.empty(0, np.int64) for _ in blocks]
        self._named: set[int] = set()  # positions of the slots that contain the name of their block
        self._open: int | None = None  # the block whose section is the last in the file
        self._continuing = RecordWriter()  # the record writer of that section
        #: Position of the end of the file.
        self.end = start

    @property
    def blocks(self) -> Sequence[MemfdBlock]:
        """The blocks, in the order of the numbers that the methods take."""
        return self._blocks

    def write(self, number: int, indices: Indices) -> int:
        """Write the present content of pages.

        Args:
            number: number of their block.
            indices: the pages in ascending order, each once.

        Returns:
            The number of bytes of memory written.

        Raises:
            OSError: no room, or the disk failed.
        """
        if not len(indices):
            return 0
        table = self._tables[number]
        zero = self._zero(number, indices)
        slots = table[indices]
        again = indices[slots > 0]
        data = indices[~zero & (slots <= 0)]
        grouped = data[table[data] < _WAITS]
        fresh = indices[zero & (slots == _NONE)]
        self._write_over(number, again)
        if len(grouped):
            taken, left = self._break_groups(number, grouped)
            fresh = np.concatenate((fresh, left))
            data = np.setdiff1d(data, taken, assume_unique=True)
        table[fresh] = _WAITS
        self._append_pages(number, data)
        self._append_groups(number, fresh)
        return (len(again) + len(data)) * PAGE_SIZE

    def unwritten(self, number: int, first: int, count: int) -> Indices:
        """The pages among *count* pages of a block from *first* on that were not written yet, in ascending order. The
        block may end before.
        """
        return np.flatnonzero(self._tables[number][first : first + count] == _NONE) + first

    def finish(self) -> None:
        """Write the zero pages that do not fill a slot, and the end of RAM. OSError."""
        for number in range(len(self._blocks)):
            if len(rest := self._still_waiting(number)):
                self._append_zeros(number, rest)
        self._close_section()
        self._append(wire.section_continue(Section.END, RAM_SECTION) + wire.END_WORD + self._footer)

    # -- what is there -------------------------------------------------------------------------------------------------

    def _zero(self, number: int, indices: Indices) -> PageBitmap:
        """Which of the pages are zero. Absent pages are not read, because a read would allocate them."""
        block = self._blocks[number]
        first, last = int(indices[0]), int(indices[-1])
        zero = block.absent_slice(first, last - first + 1)[indices - first]
        look = indices[~zero]
        if len(look):
            zero[~zero] = zero_pages(block.pages, look)
        return zero

    # -- in place ------------------------------------------------------------------------------------------------------

    def _write_over(self, number: int, indices: Indices) -> None:
        """Write pages that have a slot of their own."""
        if not len(indices):
            return
        table, pages = self._tables[number], self._blocks[number].pages
        indices = indices[np.argsort(table[indices])]
        positions = table[indices]
        cuts = (np.flatnonzero(np.diff(positions) != SLOT) + 1).tolist()
        for first, end in zip([0, *cuts], [*cuts, len(indices)], strict=True):
            position = int(positions[first])
            if end - first == 1 or position in self._named:  # a slot with a name is longer, so it is written alone
                skip = _WORD + (self._name_size(number) if position in self._named else 0)
                os.lseek(self._fd, position + skip, os.SEEK_SET)
                self._write(pages[int(indices[first])].data)
                continue
            os.lseek(self._fd, position, os.SEEK_SET)
            words = (indices[first:end].astype(np.uint64) * np.uint64(PAGE_SIZE)) | np.uint64(
                RamFlag.PAGE | RamFlag.CONTINUE
            )
            self._write_records(number, indices[first:end], words.astype(">u8"), b"")

    def _break_groups(self, number: int, data: Indices) -> tuple[Indices, Indices]:
        """Break the groups whose pages *data* hold data now: one of these pages takes the slot of each group.

        Returns:
            The pages that took a slot, and the zero pages of the groups, which have no record any more.
        """
        table = self._tables[number]
        positions, takers = np.unique(-table[data], return_index=True)
        taken = data[takers]
        members = np.concatenate([self._members(number, position) for position in positions.tolist()])
        table[members] = _NONE
        for position, page in zip(positions.tolist(), taken.tolist(), strict=True):
            self._take_slot(number, position, page)
        return taken, np.setdiff1d(members, data, assume_unique=True)

    def _take_slot(self, number: int, position: int, page: int) -> None:
        block = self._blocks[number]
        name, words = RecordWriter().words(block.name, np.array([page]) * PAGE_SIZE, RamFlag.PAGE)
        if position not in self._named:
            name, words = b"", (words.astype(np.uint64) | np.uint64(RamFlag.CONTINUE)).astype(">u8")
        os.lseek(self._fd, position, os.SEEK_SET)
        self._write_records(number, np.array([page]), words, name)
        self._tables[number][page] = position

    def _members(self, number: int, position: int) -> Indices:
        """The pages of a group, read from the file."""
        skip = self._name_size(number) if position in self._named else 0
        data = b""
        while len(data) < SLOT + skip:
            part = os.pread(self._fd, SLOT + skip - len(data), position + len(data))
            if not part:
                raise OSError(f"the file that is being written was cut short at byte {position + len(data)}")
            data += part
        records = np.frombuffer(data[:_WORD] + data[_WORD + skip :], np.uint8).reshape(GROUP, _ZERO_RECORD)
        words = np.ascontiguousarray(records[:, :_WORD]).view(">u8").reshape(-1)
        pages: Indices = (words // PAGE_SIZE).astype(np.int64)
        return pages

    # -- at the end ----------------------------------------------------------------------------------------------------

    def _append_pages(self, number: int, indices: Indices) -> None:
        for begin in range(0, len(indices), _GATHER):
            part = indices[begin : begin + _GATHER]
            records, named = self._section_of(number)
            name, words = records.words(self._blocks[number].name, part * PAGE_SIZE, RamFlag.PAGE)
            self._tables[number][part] = self._slots(len(part), named, len(name))
            os.lseek(self._fd, self.end, os.SEEK_SET)
            self._write_records(number, part, words, name)
            self.end += len(part) * SLOT + len(name)

    def _append_groups(self, number: int, fresh: Indices) -> None:
        """Add zero pages to the waiting ones, and write those that fill a slot."""
        if len(fresh):
            self._waiting[number] = np.concatenate((self._waiting[number], fresh))
        if len(self._waiting[number]) < GROUP:
            return
        waiting = self._still_waiting(number)
        count = len(waiting) // GROUP
        whole, self._waiting[number] = waiting[: count * GROUP], waiting[count * GROUP :]
        if count:
            self._append_zeros(number, whole)

    def _append_zeros(self, number: int, indices: Indices) -> None:
        """Write groups; the last one may be too short for a slot only if no page of this block follows."""
        records, named = self._section_of(number)
        data = records.zero_records(self._blocks[number].name, indices * PAGE_SIZE)
        count = -(-len(indices) // GROUP)
        slots = self._slots(count, named, self._name_size(number) if named else 0)
        self._tables[number][indices] = -np.repeat(slots, GROUP)[: len(indices)]
        self._append(data)

    def _still_waiting(self, number: int) -> Indices:
        waiting = self._waiting[number]
        still: Indices = waiting[self._tables[number][waiting] == _WAITS]
        return still

    def _slots(self, count: int, named: bool, name_size: int) -> Indices:
        """The positions of the next *count* slots."""
        slots = self.end + SLOT * np.arange(count, dtype=np.int64)
        if named:
            self._named.add(self.end)
            slots[1:] += name_size
        return slots

    def _section_of(self, number: int) -> tuple[RecordWriter, bool]:
        """Make the last section one of this block. Returns the writer of its next record, and whether the record names
        the block.
        """
        if self._open == number:
            return self._continuing, False
        self._close_section()
        self._append(wire.section_continue(Section.PART, RAM_SECTION))
        self._open, self._continuing = number, RecordWriter()
        return self._continuing, True

    def _close_section(self) -> None:
        if self._open is not None:
            self._append(wire.END_WORD + self._footer)
            self._open = None

    def _name_size(self, number: int) -> int:
        return len(wire.cstr(self._blocks[number].name))

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _append(self, data: bytes) -> None:
        os.lseek(self._fd, self.end, os.SEEK_SET)
        self._write(memoryview(data))
        self.end += len(data)

    def _write(self, view: memoryview) -> None:
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _write_records(self, number: int, indices: Indices, words: wire.Words, name: bytes) -> None:
        """Write PAGE records at the file's offset, with *name* after the first word."""
        base = np.uint64(self._blocks[number].address)
        for begin in range(0, len(indices), _GATHER):
            part, heads = indices[begin : begin + _GATHER], words[begin : begin + _GATHER]
            head = np.frombuffer(heads[:1].tobytes() + name, np.uint8)
            lead = (head.ctypes.data, len(head)) if name and not begin else None
            addresses = base + part.astype(np.uint64) * np.uint64(PAGE_SIZE)
            records = Records(heads.ctypes.data, _WORD, addresses, PAGE_SIZE, lead)
            while records.left:
                records.advance(writev(self._fd, records.rest) or 0)
