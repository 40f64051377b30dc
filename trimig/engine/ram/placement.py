"""Pages that the kernel puts where they belong, because their records were predicted.

Most of a first pass is consecutive pages of one block, one record after the other. Once such a run has been seen, the
next records are *predicted*: one scattering read asks the kernel to put their words into an array and their pages
directly into guest memory. The words are checked before anything else happens; where the prediction was wrong, the
bytes are taken back out and parsed as what they are.

A page may be overwritten by a wrong prediction, so only pages that have not been received in this attempt are ever
predicted, and one that was is zeroed again: its content was not the migration's yet. The interval cannot be seen: the
guest does not run before the stream is complete. Where the memory was never touched and has a file behind it, the pages
are read into a small buffer and written to the file (see :mod:`.receiver`), and a wrong prediction harms nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

from ...channel import vectored
from ...guest import PAGE_SIZE, FileBackedBlock, PageBitmap, Pages, RamBlock
from ...wire.constants import RamFlag

if TYPE_CHECKING:
    from ...channel.channel import Channel
    from ...wire.decoder import Decoder
    from .marked import MarkedPages

_RECORD = 8 + PAGE_SIZE
#: Pages predicted at once. Only a few of them are read by one system call; predicting many more spreads the cost of the
#: arrays. What one call may have put into the wrong place is bounded by the call.
PLACE_PAGES = 8192
#: The same where pages go to a file through a buffer, which should stay in the processor's cache.
STAGED_PAGES = 256
#: Other tasks get a turn after this many bytes at the latest.
_SLICE_BYTES = 1 << 20
#: A run this long makes the next records predictable.
ENOUGH = 32


class Target:
    """One RAM block being filled."""

    def __init__(self, block: RamBlock) -> None:
        self.name = block.name
        self.pages = block.pages
        self.words = self.pages.view(np.uint64)
        self.base = self.pages.ctypes.data
        self.received: PageBitmap = np.zeros(len(self.pages), np.bool_)
        absent = block.absent()
        #: Known to be zero without a look: it has no memory behind it, and looking would give it some.
        self.untouched: PageBitmap = np.zeros(len(self.pages), np.bool_) if absent is None else absent.copy()
        #: Told of each page that has come, if there is one.
        self.marks: MarkedPages | None = None
        self._fd = block.fd if isinstance(block, FileBackedBlock) else None

    def fresh(self, first: int, count: int) -> bool:
        """Writing these pages to the file is cheaper than through the mapping."""
        return self._fd is not None and bool(self.untouched[first : first + count].all())

    def put(self, first: int, data: Pages) -> None:
        """Consecutive pages from *first* on."""
        count = len(data)
        if self._fd is not None and self.untouched[first] and self.fresh(first, count):
            self._write(first, np.ascontiguousarray(data))
        else:
            self.pages[first : first + count] = data
        self.arrived(first, count)

    def _write(self, first: int, data: Pages) -> None:
        assert self._fd is not None
        view = data.reshape(-1).data
        position = first * PAGE_SIZE
        while len(view):
            done = os.pwrite(self._fd, view, position)
            view = view[done:]
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


class Placer:
    """Predicts and places; one for each incoming stream."""

    def __init__(self) -> None:
        self._words = np.empty(PLACE_PAGES, np.uint64)
        self._staging = np.empty((STAGED_PAGES, PAGE_SIZE), np.uint8)

    async def place(
        self, channel: Channel, decoder: Decoder, target: Target, first: int, run_length: int
    ) -> int | None:
        """Read what continues a run of *run_length* pages at page *first*; pages placed, or None: nothing predictable.

        **Cancellation:** a page that was not received yet may hold part of its content; the decoder is unusable.
        """
        if run_length < ENOUGH:
            return None
        fresh = target.fresh(first, STAGED_PAGES)
        ahead = target.received[first : first + (STAGED_PAGES if fresh else PLACE_PAGES)]
        count = int(np.argmax(ahead)) if ahead.any() else len(ahead)
        if count < ENOUGH:
            return None
        indices = np.arange(first, first + count, dtype=np.uint64)
        again = np.uint64(RamFlag.PAGE | RamFlag.CONTINUE)
        expected = ((indices * np.uint64(PAGE_SIZE)) | again).astype(">u8").view(np.uint64)
        rest = decoder.take_rest()
        if len(rest) >= 8 and rest[:8] != expected[:1].tobytes():
            decoder.give_back(rest)
            decoder.end_run()
            return 0
        staging = self._staging[:count] if fresh else None
        attempt = _Placing(target, first, self._words[:count], staging, expected)
        attempt.begin(rest)
        try:
            ended = await attempt.read(channel)
        finally:
            placed, left, wrong = attempt.settle()
        decoder.placed(placed)
        decoder.give_back(left)
        if ended or wrong:
            decoder.end_run()  # after the end of the stream too: so that the ordinary read finds it
        return placed


class _Placing:
    """One prediction: the records of pages *first* and following, with these words."""

    def __init__(
        self, target: Target, first: int, words: NDArray[np.uint64], staging: Pages | None, expected: NDArray[np.uint64]
    ) -> None:
        count = len(words)
        self._target = target
        self._first = first
        self._fresh = staging is not None
        self._bodies = target.pages[first : first + count] if staging is None else staging
        self._words = words
        self._expected = expected
        addresses = self._bodies.ctypes.data + np.arange(count, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self._records = vectored.Records(words.ctypes.data, 8, addresses, PAGE_SIZE)

    def begin(self, rest: bytes) -> None:
        """The part of the first record that has come already stands in front."""
        head = np.frombuffer(rest, np.uint8)
        self._words[:1].view(np.uint8)[: min(8, len(rest))] = head[:8]
        self._bodies[0, : max(0, len(rest) - 8)] = head[8:]
        self._records.advance(len(rest))

    async def read(self, channel: Channel) -> bool:
        """Read until most records are there, or one is not as predicted; True at the end of the stream.

        **Cancellation:** nothing is read by the call that is cancelled.
        """
        records = self._records
        await trio.lowlevel.checkpoint()
        turn = records.done
        checked = 0
        while records.left > _RECORD:
            if not await channel.read_records(records):
                return True
            begun = (records.done + PAGE_SIZE) // _RECORD  # records whose word is complete
            if (self._words[checked:begun] != self._expected[checked:begun]).any():
                break
            checked = begun
            if 8 * records.left < records.size:
                break  # the next prediction reads more with one call than the rest of this one
            if records.done - turn >= _SLICE_BYTES:
                await trio.lowlevel.checkpoint()
                turn = records.done
        return False

    def settle(self) -> tuple[int, bytes, bool]:
        """Keep the records that came as predicted; the bytes behind them, and whether a record was a wrong guess."""
        done, target, first = self._records.done, self._target, self._first
        whole = done // _RECORD
        same = self._words[:whole] == self._expected[:whole]
        good = whole if same.all() else int(np.argmin(same))
        left = done - good * _RECORD
        touched = -(-left // _RECORD)
        rest = np.empty((touched, _RECORD), np.uint8)
        rest[:, :8] = self._words[good : good + touched].view(np.uint8).reshape(-1, 8)
        rest[:, 8:] = self._bodies[good : good + touched]
        if self._fresh:
            if good:
                target.put(first, self._bodies[:good])
        else:
            target.arrived(first, good)
            if touched:
                # Not received, so nothing of it is the migration's: back to what an untouched page reads as.
                self._bodies[good : good + touched] = 0
                target.untouched[first + good : first + good + touched] = False
        return good, rest.reshape(-1)[:left].tobytes(), good < whole
