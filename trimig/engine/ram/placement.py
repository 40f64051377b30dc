"""Pages that the kernel puts where they belong, because their records were predicted.

Most of a first pass is consecutive pages of one block, one record after the other. Once such a run has been seen, the
next records are *predicted*: one scattering read asks the kernel to put their words into an array and their pages
directly into guest memory. The words are checked before anything else happens; where the prediction was wrong, the
bytes are taken back out and parsed as what they are.

A page may be overwritten by a wrong prediction, so only pages that have not been received in this attempt are ever
predicted, and one that was is zeroed again: its content was not the migration's yet. The interval cannot be seen: the
guest does not run before the stream is complete. Where the memory was never touched and has a file behind it, the pages
are read into a small buffer and written to the file (see :mod:`.receiver`), and a wrong prediction harms nothing.

Both are plans of :mod:`trimig.channel.step`: a thread reads, compares and writes to the file, and the run loop goes on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ...channel.vectored import CALL_BYTES, Records
from ...guest import PAGE_SIZE, FileBackedBlock, PageBitmap, Pages, RamBlock
from ...wire.constants import RamFlag
from ...wire.pages.multifd import PACKET_PAGES
from ..guest_results import absent_pages

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...channel.vectored import Span
    from ...wire.decoder import Decoder
    from .marked import MarkedPages

_RECORD = 8 + PAGE_SIZE
#: Pages predicted at once. Only a few of them are read by one system call; predicting many more spreads the cost of the
#: arrays, and of the change of threads. What one call may have put into the wrong place is bounded by the call.
PLACE_PAGES = 8192
#: Pages of the buffer through which they go to a file; it should stay in the processor's cache.
STAGED_PAGES = 256
#: A run this long makes the next records predictable.
ENOUGH = 32
#: Bytes of an ordinary read behind placed pages: an end of a section, the head of the next one, and enough records for the next
#: prediction. More of them would be copied one more time. After so many such reads in a row the stream is another one.
_SHORT_BYTES = 48 * (8 + PAGE_SIZE)
_SHORT_READS = 3


_NONE: Final = bytes(PACKET_PAGES)


class Target:
    """One RAM block being filled."""

    def __init__(self, block: RamBlock) -> None:
        self.name = block.name
        self.pages = block.pages
        self.words = self.pages.view(np.uint64)
        self.base = self.pages.ctypes.data
        self.received: PageBitmap = np.zeros(len(self.pages), np.bool_)
        absent = absent_pages(block.absent(), block)
        #: Known to be zero without a look: it has no memory behind it, and looking would give it some.
        self.untouched: PageBitmap = np.zeros(len(self.pages), np.bool_) if absent is None else absent.copy()
        #: Told of each page that has come, if there is one.
        self.marks: MarkedPages | None = None
        self._fd = block.fd if isinstance(block, FileBackedBlock) else None
        self._untouched_bytes = self.untouched.view(np.uint8).data

    def begin_run(self, first: int, count: int) -> bool:
        """Consecutive pages from *first* on are about to come, up to PACKET_PAGES of them.

        Returns:
            True if they are all cheaper to write to the file than through the mapping.
        """
        part = self._untouched_bytes[first : first + count]
        fresh = self._fd is not None and part.tobytes().count(1) == count
        part[:] = _NONE[:count]
        return fresh

    def count_missing(self, first: int, most: int) -> int:
        """How many pages from *first* on have not been received, *most* at most, up to one that has."""
        return _count_leading(~self.received[first : first + most])

    def count_fresh(self, first: int, most: int) -> int:
        """How many pages from *first* on, *most* at most, are cheaper to write to the file than through the mapping."""
        return 0 if self._fd is None else _count_leading(self.untouched[first : first + most])

    def fresh_each(self, indices: NDArray[np.int64]) -> bool:
        """True if pages in any order are all cheaper to write to the file than through the mapping."""
        return self._fd is not None and bool(self.untouched[indices].all())

    def put(self, first: int, data: Pages) -> None:
        """Consecutive pages from *first* on."""
        count = len(data)
        if self._fd is not None and self.untouched[first] and self.count_fresh(first, count) == count:
            self.write(first, np.ascontiguousarray(data))
        else:
            self.pages[first : first + count] = data
        self.arrived(first, count)

    def write(self, first: int, data: Pages) -> None:
        """Write consecutive pages from *first* on to the file. A thread may do that. OSError: there is no memory left."""
        self.write_at(first * PAGE_SIZE, data.reshape(-1).data)

    def write_at(self, position: int, data: memoryview) -> None:
        """Write bytes to the file at *position*, in bytes. A thread may do that. OSError: there is no memory left."""
        assert self._fd is not None
        while len(data):
            done = os.pwrite(self._fd, data, position)
            data = data[done:]
            position += done

    def arrived(self, first: int, count: int) -> None:
        """Pages from *first* on hold what the source sent."""
        self.received[first : first + count] = True
        self.untouched[first : first + count] = False
        if self.marks is not None:
            self.marks.mark(self.name, first, count)

    def arrived_each(self, indices: NDArray[np.int64], *, touched: bool = True) -> None:
        """The same for pages in any order; *touched* is False for pages that are zero and may have no memory."""
        self.received[indices] = True
        if touched:
            self.untouched[indices] = False
        if self.marks is not None:
            self.marks.mark_each(self.name, indices)


def _count_leading(which: PageBitmap) -> int:
    return len(which) if which.all() else int(np.argmin(which))


class Placer:
    """Predicts and places; one for each incoming stream."""

    def __init__(self) -> None:
        self._words = np.empty(PLACE_PAGES, np.uint64)
        self._staging = np.empty((STAGED_PAGES, PAGE_SIZE), np.uint8)
        self._usual = 0  # pages of the last run that ended; a source fills its sections alike
        self._short_reads = 0

    def shorten(self, view: memoryview) -> memoryview:
        """The part of *view* that the next ordinary read should fill at most."""
        if not self._short_reads:
            return view
        self._short_reads -= 1
        return view[:_SHORT_BYTES]

    async def place(
        self, channel: Channel, decoder: Decoder, target: Target, first: int, run_length: int
    ) -> int | None:
        """Read what continues a run of *run_length* pages at page *first*; pages placed, or None: nothing predictable.

        **Cancellation:** a page that was not received yet may hold part of its content; the decoder is unusable.
        """
        if run_length < ENOUGH or run_length == self._usual:
            return None
        count = target.count_missing(first, PLACE_PAGES)
        if count < ENOUGH:
            return None
        to_usual_end = run_length < self._usual <= run_length + count
        if to_usual_end:
            count = self._usual - run_length
        fresh = target.count_fresh(first, count)
        staged = fresh >= min(STAGED_PAGES, count)
        if staged and fresh < count:
            count, to_usual_end = fresh, False
        indices = np.arange(first, first + count, dtype=np.uint64)
        again = np.uint64(RamFlag.PAGE | RamFlag.CONTINUE)
        expected = ((indices * np.uint64(PAGE_SIZE)) | again).astype(">u8").view(np.uint64)
        rest = decoder.take_rest()
        if len(rest) >= 8 and rest[:8] != expected[:1].tobytes():
            decoder.give_back(rest)
            decoder.end_run()
            return 0
        attempt = _Placing(target, first, self._words, expected, self._staging if staged else None, whole=to_usual_end)
        attempt.begin(rest)
        try:
            ended = await channel.receive_vector(attempt, count * _RECORD)
        finally:
            placed, left, wrong = attempt.settle()
        decoder.placed(placed)
        decoder.give_back(left)
        if ended or wrong:
            decoder.end_run()  # after the end of the stream too: so that the ordinary read finds it
        if wrong:
            self._usual = run_length + placed
        self._short_reads = _SHORT_READS
        return placed


class _Placing:
    """One prediction: the records of pages *first* and following. A :class:`trimig.channel.step.Plan`.

    A thread may move it on. It touches the pages and the file only; what the target knows of them, :meth:`settle` changes.

    Args:
        words: room for the words of the records.
        expected: those words, as they should be; of so many pages.
        staging: the buffer of pages that are written to the file; None: pages are placed directly.
        whole: read all of them, because another record is expected behind them.
    """

    def __init__(
        self,
        target: Target,
        first: int,
        words: NDArray[np.uint64],
        expected: NDArray[np.uint64],
        staging: Pages | None,
        *,
        whole: bool,
    ) -> None:
        self._target = target
        self._first = first
        self._count = len(expected)
        self._words = words
        self._came = words.data
        self._expected = expected
        self._staging = staging
        self._whole = whole
        self._written = 0  # pages that are in the file; the present records follow them
        self._checked = 0  # present records whose word is as expected
        self._found: tuple[int, bytes, bool] | None = None
        self._next_records()

    def _next_records(self) -> None:
        count = self._count - self._written
        if self._staging is None:
            self._bodies = self._target.pages[self._first : self._first + count]
        else:
            count = min(count, len(self._staging))
            self._bodies = self._staging[:count]
        addresses = self._bodies.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self._records = Records(self._words.ctypes.data, 8, addresses, PAGE_SIZE)
        self._wanted = self._expected[self._written : self._written + count]
        self._due = self._wanted.data
        self._last = self._written + count == self._count
        # Not to the last record: the next vector reads more with one call than the rest of this one.
        most = min(CALL_BYTES, (self._records.size - 1) // 8)
        self._enough = 0 if self._last and self._whole else most
        self._checked = 0

    def begin(self, rest: bytes) -> None:
        """The part of the first record that has come already stands in front."""
        head = np.frombuffer(rest, np.uint8)
        self._words[:1].view(np.uint8)[: min(8, len(rest))] = head[:8]
        self._bodies[0, : max(0, len(rest) - 8)] = head[8:]
        self._records.advance(len(rest))

    @property
    def resting(self) -> bool:
        """Never, see :class:`trimig.channel.step.Plan`."""
        return False

    @property
    def rest(self) -> Span:
        """Where the next bytes go, see :class:`trimig.channel.step.Plan`."""
        return self._records.rest if self._found is None else (0, 0)

    def advance(self, count: int) -> None:
        """Compare the words that have come, see :class:`trimig.channel.step.Plan`. OSError of the file."""
        records, checked = self._records, self._checked
        records.advance(count)
        begun = self._checked = (records.done + PAGE_SIZE) // _RECORD  # records whose word is complete
        if self._came[checked:begun] != self._due[checked:begun]:
            self._found = self._take_out()
        elif records.left > self._enough:
            pass
        elif self._last:
            self._found = self._take_out()
        else:
            self._write_staged()

    def _write_staged(self) -> None:
        """Write the whole records to the file; the part of one behind them stands in front of the next vector."""
        whole, inside = divmod(self._records.done, _RECORD)
        self._target.write(self._first + self._written, self._bodies[:whole])
        rest = self._words[whole : whole + 1].tobytes() + self._bodies[whole : whole + 1].tobytes()
        self._written += whole
        self._next_records()
        self.begin(rest[:inside])

    def settle(self) -> tuple[int, bytes, bool]:
        """Keep the records that came as predicted. OSError of the file.

        Returns:
            The number of their pages; the bytes behind them; and whether a record was a wrong guess.
        """
        placed, rest, wrong = self._found or self._take_out()
        if placed:
            self._target.arrived(self._first, placed)
        if rest and self._staging is None:
            behind = self._first + placed
            self._target.untouched[behind : behind - (-len(rest) // _RECORD)] = False
        return placed, rest, wrong

    def _take_out(self) -> tuple[int, bytes, bool]:
        """Take the bytes behind the good records out of their places; what :meth:`settle` returns."""
        done = self._records.done
        complete = done // _RECORD
        same = self._words[:complete] == self._wanted[:complete]
        good = complete if same.all() else int(np.argmin(same))
        left = done - good * _RECORD
        touched = -(-left // _RECORD)
        rest = np.empty((touched, _RECORD), np.uint8)
        rest[:, :8] = self._words[good : good + touched].view(np.uint8).reshape(-1, 8)
        rest[:, 8:] = self._bodies[good : good + touched]
        if self._staging is None:
            # Not received, so nothing of it is the migration's: back to what an untouched page reads as.
            self._bodies[good : good + touched] = 0
        elif good:
            self._target.write(self._first + self._written, self._bodies[:good])
        return self._written + good, rest.reshape(-1)[:left].tobytes(), good < complete
