"""Page records -> guest memory on the destination, in batches.

Most of a first pass is consecutive pages of one block, one record after the other. Once such a run has been seen, the
next records are *predicted*: the kernel is asked to put their words into an array and their pages directly where they
belong (one copy instead of two). The words are checked before anything else happens; where the prediction was wrong,
the bytes are taken back out of guest memory and parsed as what they are.

A page may be overwritten by a wrong prediction, so only pages that have not been received in this attempt are ever
predicted, and one that was is zeroed again: its content was not the migration's yet. Nobody can see the interval: the
guest does not run before the stream is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import trio
from numpy.typing import NDArray

from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE, PageBitmap, RamBlock
from ..monitor import Counters
from ..wire import Decoder, RamFlag
from ..wire.events import PageRun, RamList, ZeroRun
from . import vectored
from .channel import BATCH_PAGES, Channel

_RECORD = 8 + PAGE_SIZE
#: Pages predicted at once. Placing them is one slice of the run loop, so it is kept to about a millisecond.
PLACE_PAGES = 256
#: A run this long makes the next records predictable.
_ENOUGH = 32


class _Target:
    """One RAM block being filled."""

    def __init__(self, block: RamBlock) -> None:
        self.block = block
        self.pages = block.pages
        self.words = self.pages.view(np.uint64)
        self.base = self.pages.ctypes.data
        self.received: PageBitmap = np.zeros(len(self.pages), np.bool_)
        absent = block.absent()
        #: Known to be zero without a look: it has no memory behind it, and looking would give it some.
        self.untouched: PageBitmap = np.zeros(len(self.pages), np.bool_) if absent is None else absent.copy()


class RamReceiver:
    """Fills the guest's RAM blocks."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._targets: dict[str, _Target] = {}
        self._words = np.empty(BATCH_PAGES, np.uint64)

    def open(self, announced: RamList, blocks: Sequence[RamBlock]) -> None:
        """Check the size list against the guest's blocks and get ready.

        Raises:
            RemoteProtocolError: a block is unknown here, has another size, or is missing in the list.
        """
        mine = {block.name: block for block in blocks}
        for name, length in announced.blocks:
            block = mine.get(name)
            if block is None:
                known = ", ".join(repr(n) for n in mine) or "none"
                raise RemoteProtocolError(
                    f"unknown RAM block {name!r}; this guest has {known}", offset=announced.at, section="ram"
                )
            if block.length != length:
                raise RemoteProtocolError(
                    f"RAM block {name!r} has {length:#x} bytes at the source and {block.length:#x} here",
                    offset=announced.at,
                    section="ram",
                )
        if missing := sorted(set(mine) - {name for name, _ in announced.blocks}):
            raise RemoteProtocolError(
                f"the source has no RAM block {missing[0]!r}, which this guest needs",
                offset=announced.at,
                section="ram",
            )
        if not self._targets:  # a second START repeats the list (stream.md part 10)
            self._targets = {name: _Target(mine[name]) for name, _ in announced.blocks}
        self._counters.total = sum(length for _, length in announced.blocks)

    def missing(self) -> Mapping[str, int]:
        """Pages per block that were never received; blocks without any are left out."""
        counts = {name: len(t.received) - int(np.count_nonzero(t.received)) for name, t in self._targets.items()}
        return {name: count for name, count in counts.items() if count}

    def pages(self, run: PageRun) -> None:
        """Copy a run of pages to their places."""
        target = self._targets[run.block]
        indices = run.offsets // PAGE_SIZE
        first, count = int(indices[0]), len(indices)
        if count == 1:
            target.pages[first] = run.data[0]
            target.received[first] = True
            target.untouched[first] = False
        elif int(indices[-1]) - first == count - 1 and bool((np.diff(indices) == 1).all()):
            target.pages[first : first + count] = run.data
            target.received[first : first + count] = True
            target.untouched[first : first + count] = False
        else:
            target.pages[indices] = run.data
            target.received[indices] = True
            target.untouched[indices] = False
        self._counters.normal += count

    def zeros(self, run: ZeroRun) -> None:
        """Make pages hold their fill byte; memory that is zero already is not touched."""
        target = self._targets[run.block]
        indices = run.offsets // PAGE_SIZE
        target.received[indices] = True
        self._counters.duplicate += len(indices)
        if run.fills.any():
            target.pages[indices] = run.fills[:, None]
            target.untouched[indices] = False
            return
        look = indices[~target.untouched[indices]]
        for start in range(0, len(look), BATCH_PAGES):
            part = look[start : start + BATCH_PAGES]
            dirty = part[target.words[part].any(axis=1)]
            if len(dirty):
                target.pages[dirty] = 0

    async def place_run(self, channel: Channel, decoder: Decoder) -> bool:
        """Let the kernel place the predicted continuation of the open run; False if nothing can be predicted.

        True: bytes were read (or the stream has ended, which the next ordinary read will find out as well).

        **Cancellation:** a page that was not received yet may hold part of its content; the decoder is unusable.
        """
        if channel.socket_fd is None or (run := decoder.open_run) is None or run[2] < _ENOUGH:
            return False
        name, next_offset, _ = run
        target = self._targets[name]
        first = next_offset // PAGE_SIZE
        count = self._predictable(target, first)
        if count < _ENOUGH:
            return False
        rest = decoder.take_rest()
        await self._place(channel, decoder, target, first, count, rest)
        return True

    def _predictable(self, target: _Target, first: int) -> int:
        ahead = target.received[first : first + PLACE_PAGES]
        return int(np.argmax(ahead)) if ahead.any() else len(ahead)

    async def _place(
        self, channel: Channel, decoder: Decoder, target: _Target, first: int, count: int, rest: bytes
    ) -> None:
        indices = np.arange(first, first + count, dtype=np.uint64)
        expected = (
            ((indices * np.uint64(PAGE_SIZE)) | np.uint64(RamFlag.PAGE | RamFlag.CONTINUE))
            .astype(">u8")
            .view(np.uint64)
        )
        words = self._words[:count]
        words[:] = 0
        records = vectored.Records(words.ctypes.data, 8, target.base + indices * np.uint64(PAGE_SIZE), PAGE_SIZE)
        # The part of the first record that has come already stands in front.
        head = np.frombuffer(rest, np.uint8)
        words.view(np.uint8)[: min(8, len(rest))] = head[:8]
        if len(rest) >= 8 and words[0] != expected[0]:
            decoder.give_back(rest)
            decoder.end_run()
            return
        target.pages[first, : max(0, len(rest) - 8)] = head[8:]
        records.advance(len(rest))
        ok = ended = False
        try:
            await trio.lowlevel.checkpoint()
            while records.left > _RECORD:
                if not await channel.read_records(records):
                    ended = True
                    break
                begun = (records.done + PAGE_SIZE) // _RECORD  # records whose word is complete
                if (words[:begun] != expected[:begun]).any() or 2 * records.done > records.size:
                    break
            ok = True
        finally:
            self._settle(decoder, target, first, records.done, words, expected, ok=ok)
        if ended:
            decoder.end_run()  # so that nothing is predicted any more, and the ordinary read finds the end too

    def _settle(
        self,
        decoder: Decoder,
        target: _Target,
        first: int,
        done: int,
        words: NDArray[np.uint64],
        expected: NDArray[np.uint64],
        *,
        ok: bool,
    ) -> None:
        """Accept the records that came as predicted; give everything behind them back to the decoder."""
        whole = done // _RECORD
        same = words[:whole] == expected[:whole]
        good = whole if same.all() else int(np.argmin(same))
        decoder.placed(good)
        target.received[first : first + good] = True
        target.untouched[first : first + good] = False
        self._counters.normal += good
        left = done - good * _RECORD
        if not left:
            return
        touched = -(-left // _RECORD)
        again = np.empty((touched, _RECORD), np.uint8)
        again[:, :8] = words[good : good + touched].view(np.uint8).reshape(-1, 8)
        again[:, 8:] = target.pages[first + good : first + good + touched]
        # Not received, so nothing of it is the migration's: back to what an untouched page reads as.
        target.pages[first + good : first + good + touched] = 0
        target.untouched[first + good : first + good + touched] = False
        if ok:
            decoder.give_back(again.reshape(-1)[:left].tobytes())
            if good < whole:
                decoder.end_run()
