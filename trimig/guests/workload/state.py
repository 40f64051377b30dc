"""The workload: writes to memory, and a check afterwards that no write was lost or replayed.

The workload writes pages, and numbers its writes from 1. Write *s* goes to page ``(stride * (s - 1) + offset) mod hot``
and fills all of it with words computed from the seed, the page and *s*. The stride is coprime to the number of hot
pages, so each page is written exactly once in every ``hot`` writes, and the last write to a page has a closed form. A
journal, which is migrated as device state, has the number of writes made. So the journal determines every word of
memory, and :func:`verify` compares all of them:

* hot pages hold their last write, or the initial pattern (number 0) if they were never written;
* cold pages hold the initial pattern, except that a quarter of them, in runs, stays zero.

Half of the pages, in runs, hold the same few words again and again, so that they can be compressed; all others cannot.

A missing write, or an extra one, shows as the content of another number.

Pure functions over arrays, in whole batches; nothing here reads a clock or does I/O.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...guest import PAGE_SIZE, Pages
from ...wire.devices.vmstate import Field, VMState
from ..device import Device

Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]

WORDS_PER_PAGE: Final = PAGE_SIZE // 8
#: Pages that are computed at a time; the scratch memory is twice their size.
BATCH: Final = 128
#: Length of a run of cold pages; every fourth run stays zero.
_RUN: Final = 64
#: For a wrong page, :func:`verify` searches this many rounds of writes around the expected write.
_ROUNDS: Final = 64

_U64: Final = np.uint64
#: The members of a :class:`WorkloadState`, in order.
_STATE: Final = struct.Struct(">6Q")
_RAMP: Final[Words] = np.arange(WORDS_PER_PAGE, dtype=np.uint64) * _U64(0x9E3779B97F4A7C15)
#: Length of a run of pages that can be compressed, and of the run of others behind it.
_REPEATING_RUN: Final = 16
#: Words of a page that can be compressed before they come again.
_PERIOD: Final = 64
_REPEATING_RAMP: Final[Words] = np.resize(_RAMP[:_PERIOD], WORDS_PER_PAGE)
_BY_PAGE: Final = _U64(0xD1342543DE82EF95)
_BY_NUMBER: Final = _U64(0xA24BAED4963EE407)
_MIX_1: Final = _U64(0xBF58476D1CE4E5B9)
_MIX_2: Final = _U64(0x94D049BB133111EB)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadState:
    """The content of the journal, which determines every byte of the memory.

    Raises:
        ValueError: numbers that do not fit together.
    """

    seed: int
    #: Pages of the RAM block.
    ram_pages: int
    #: Pages from the first on that are written again and again.
    hot_pages: int
    #: Bytes per second; each write counts PAGE_SIZE.
    dirty_rate: int
    #: Number of writes made.
    writes: int = 0
    #: Bytes at the start of its page that a write changes, a multiple of 8.
    write_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"the seed {self.seed} does not fit into 64 bits")
        if not 1 <= self.ram_pages < 1 << 31:
            raise ValueError(f"{self.ram_pages} pages of RAM are not within 1 to {(1 << 31) - 1}")
        if not 0 <= self.hot_pages <= self.ram_pages:
            raise ValueError(f"{self.hot_pages} hot pages are not within the {self.ram_pages} of the RAM")
        if not 0 <= self.dirty_rate < 1 << 48:
            raise ValueError(f"a dirty rate of {self.dirty_rate} bytes/s is not within 0 to {(1 << 48) - 1}")
        if self.hot_pages == 0 and (self.dirty_rate or self.writes):
            raise ValueError("without hot pages nothing can be written")
        if not 0 <= self.writes < 1 << 62:
            raise ValueError(f"{self.writes} writes are not within 0 to {(1 << 62) - 1}")
        if not 8 <= self.write_size <= PAGE_SIZE or self.write_size % 8:
            raise ValueError(f"a write of {self.write_size} bytes is not a multiple of 8 from 8 to {PAGE_SIZE}")

    def pack(self) -> bytes:
        """The state as bytes, as it is in the payload of the journal."""
        return _STATE.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> WorkloadState:
        """The state in *data*. ValueError."""
        if len(data) != _STATE.size:
            raise ValueError(f"{len(data)} bytes of state instead of {_STATE.size}")
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**dict(zip(names, _STATE.unpack(data), strict=True)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of :func:`verify`. The last five members are about the first wrong word, and None if there is none."""

    ok: bool
    #: Writes counted in the journal.
    writes: int
    pages_checked: int
    wrong_page: int | None = None
    #: Index of the first wrong 8-byte word in that page.
    wrong_word: int | None = None
    expected: int | None = None
    found: int | None = None
    #: The write whose content the whole page holds instead, if it is one of the last or next few writes to that page.
    found_write: int | None = None

    def __str__(self) -> str:
        if self.ok:
            return f"all {self.pages_checked} pages are as {self.writes} writes left them"
        text = f"page {self.wrong_page}, word {self.wrong_word}: 0x{self.found:016x} instead of 0x{self.expected:016x}"
        if self.found_write is None:
            return f"{text} (not the content of any write near)"
        return f"{text} (the page is as write {self.found_write} left it)"


def words_of(pages: Pages) -> Words:
    """*pages* as words, shape ``(n, WORDS_PER_PAGE)``, the same memory."""
    return pages.view(np.uint64)


def stride_and_offset(state: WorkloadState) -> tuple[int, int]:
    """The constants of the sequence of pages; 0, 0 without hot pages."""
    hot = state.hot_pages
    if not hot:
        return 0, 0
    stride = max(1, round(hot * 0.6180339887) + state.seed % 7)
    while math.gcd(stride, hot) != 1:
        stride += 1
    return stride % hot if hot > 1 else 1, (state.seed >> 3) % hot


def pages_of_writes(state: WorkloadState, first: int, count: int) -> Numbers:
    """The page of each of the writes *first*, *first* + 1, …"""
    stride, offset = stride_and_offset(state)
    hot = state.hot_pages
    # Reduced before the multiplication, so that the product stays below 2**62.
    turn = (np.arange(first - 1, first - 1 + count, dtype=np.int64)) % hot
    return (turn * stride + offset) % hot


def last_writes(state: WorkloadState, first: int, count: int) -> Numbers:
    """The number of the last write to each of *count* pages from page *first* on: 0 for none, -1 for a zero page."""
    pages = np.arange(first, first + count, dtype=np.int64)
    hot = state.hot_pages
    result = np.zeros(count, dtype=np.int64)
    if hot:
        stride, offset = stride_and_offset(state)
        inverse = pow(stride, -1, hot) if hot > 1 else 0
        turn = ((pages - offset) % hot) * inverse % hot  # write turn + 1 is the first one to that page
        hit = (pages < hot) & (turn < state.writes)
        result[hit] = (turn + (state.writes - 1 - turn) // hot * hot + 1)[hit]
    cold = pages - hot
    run = max(1, min(_RUN, (state.ram_pages - hot) // 4))
    result[(cold >= 0) & (cold // run % 4 == 3)] = -1
    return result


def fill(state: WorkloadState, pages: Numbers, numbers: Numbers, out: Words) -> None:
    """Compute the content that write *numbers[k]* gives to page *pages[k]*; -1 means a zero page.

    Args:
        pages, numbers: shape ``(n,)``.
        out: shape ``(n, WORDS_PER_PAGE)``, overwritten.
    """
    written = state.write_size // 8
    _fill(state, pages, numbers, out[:, :written], 0)
    if written < WORDS_PER_PAGE:
        _fill(state, pages, np.minimum(numbers, 0), out[:, written:], written)


def _fill(state: WorkloadState, pages: Numbers, numbers: Numbers, out: Words, first: int) -> None:
    """The words from *first* on."""
    base = pages.astype(np.uint64) * _BY_PAGE + numbers.astype(np.uint64) * _BY_NUMBER + _U64(state.seed)
    base = (base ^ (base >> _U64(30))) * _MIX_1
    base = (base ^ (base >> _U64(27))) * _MIX_2
    end = first + out.shape[1]
    np.add(base[:, None], _RAMP[first:end], out=out)
    repeating = np.flatnonzero(pages // _REPEATING_RUN % 2)
    if len(repeating):
        out[repeating] = base[repeating, None] + _REPEATING_RAMP[first:end]
    # One more round over every word, so that the other pages cannot be compressed.
    shifted = out >> _U64(29)
    np.bitwise_xor(out, shifted, out=out)
    np.multiply(out, _MIX_1, out=out)
    np.right_shift(out, _U64(32), out=shifted)
    np.bitwise_xor(out, shifted, out=out)
    out[numbers < 0] = 0


def initialise(state: WorkloadState, words: Words) -> None:
    """Set *words* to the content before the first write. Zero pages are not touched: *words* must be zero."""
    scratch = np.empty((BATCH, WORDS_PER_PAGE), dtype=np.uint64)
    fresh = dataclasses.replace(state, writes=0)
    for first in range(0, state.ram_pages, BATCH):
        count = min(BATCH, state.ram_pages - first)
        numbers = last_writes(fresh, first, count)
        pages = np.flatnonzero(numbers >= 0).astype(np.int64) + first
        fill(state, pages, np.zeros(len(pages), dtype=np.int64), scratch[: len(pages)])
        words[pages] = scratch[: len(pages)]


def write(state: WorkloadState, words: Words, count: int) -> WorkloadState:
    """Make the next *count* writes, at most BATCH and at most one to each page; returns the new state."""
    count = min(count, BATCH, state.hot_pages)
    if count <= 0:
        return state
    pages = pages_of_writes(state, state.writes + 1, count)
    content = np.empty((count, state.write_size // 8), dtype=np.uint64)
    _fill(state, pages, np.arange(state.writes + 1, state.writes + 1 + count, dtype=np.int64), content, 0)
    words[pages, : content.shape[1]] = content
    return dataclasses.replace(state, writes=state.writes + count)


def verify_slice(state: WorkloadState, words: Words, first: int, count: int) -> Verification:
    """:func:`verify` for *count* pages from *first* on, for callers who must not hold the run loop.

    One slice of BATCH pages takes less than a millisecond.
    """
    numbers = last_writes(state, first, count)
    pages = np.arange(first, first + count, dtype=np.int64)
    expected = np.empty((count, WORDS_PER_PAGE), dtype=np.uint64)
    fill(state, pages, numbers, expected)
    found = words[first : first + count]
    wrong = (found != expected).any(axis=1)
    if not wrong.any():
        return Verification(ok=True, writes=state.writes, pages_checked=count)
    row = int(wrong.argmax())
    word = int((found[row] != expected[row]).argmax())
    return Verification(
        ok=False,
        writes=state.writes,
        pages_checked=count,
        wrong_page=first + row,
        wrong_word=word,
        expected=int(expected[row, word]),
        found=int(found[row, word]),
        found_write=_which_write(state, first + row, int(numbers[row]), found[row]),
    )


def verify(state: WorkloadState, words: Words) -> Verification:
    """Compare every word of every page with its expected value by *state*; stops at the first wrong slice.

    The guest must be paused. About two seconds for each GiB.

    Raises:
        ValueError: *words* does not have the size that *state* describes.
    """
    if len(words) != state.ram_pages:
        raise ValueError(f"{len(words)} pages are given, the journal is about {state.ram_pages}")
    for first in range(0, state.ram_pages, BATCH):
        result = verify_slice(state, words, first, min(BATCH, state.ram_pages - first))
        if not result.ok:
            return dataclasses.replace(result, pages_checked=first + result.pages_checked)
    return Verification(ok=True, writes=state.writes, pages_checked=state.ram_pages)


def _which_write(state: WorkloadState, page: int, expected: int, content: Words) -> int | None:
    """The number of the write that left *content* on *page*, among the writes a few rounds around *expected*."""
    candidates = np.array([0], dtype=np.int64)
    if page < state.hot_pages:
        rounds = np.arange(-_ROUNDS, _ROUNDS + 1, dtype=np.int64) * state.hot_pages
        if expected <= 0:  # never written: its first write is still to come
            later = last_writes(dataclasses.replace(state, writes=state.writes + state.hot_pages), page, 1)
            expected = int(later[0])
        near = expected + rounds
        candidates = np.concatenate((near[near > 0], candidates))
    would_be = np.empty((len(candidates), WORDS_PER_PAGE), dtype=np.uint64)
    fill(state, np.full(len(candidates), page, dtype=np.int64), candidates, would_be)
    same = np.flatnonzero((would_be == content).all(axis=1))
    return int(candidates[same[0]]) if len(same) else None


class Journal(Device):
    """The device ``trimig-workload``: the :class:`WorkloadState` on the wire.

    A state with another number of pages is refused, because the size of the memory cannot change.
    """

    vmstate = VMState(
        "trimig-workload",
        version=1,
        fields=tuple(Field(field.name, "uint64") for field in dataclasses.fields(WorkloadState)),
    )

    def __init__(self, state: WorkloadState) -> None:
        super().__init__()
        self._own_pages = state.ram_pages
        self.state = state

    @property
    def state(self) -> WorkloadState:
        """The state as one value."""
        return WorkloadState(**{field.name: getattr(self, field.name) for field in dataclasses.fields(WorkloadState)})

    @state.setter
    def state(self, state: WorkloadState) -> None:
        self.restore(dataclasses.asdict(state))

    @property
    def worker_state(self) -> bytes:
        """The state, for the worker."""
        return self.state.pack()

    def set_worker_state(self, data: bytes) -> None:
        """See :class:`trimig.guests.worker.guest.WorkerState`."""
        self.state = WorkloadState.unpack(data)

    def post_load(self, version_id: int) -> None:
        """Raise ValueError for numbers that are not possible for this guest."""
        if self.state.ram_pages != self._own_pages:
            raise ValueError(f"the workload has {self.state.ram_pages} pages there and {self._own_pages} here")
