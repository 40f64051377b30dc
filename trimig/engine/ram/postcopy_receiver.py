"""The destination in postcopy: the guest runs, and what it lacks is asked for and put in its place.

One :class:`PostcopyReceiver` is shared by what reads faults and asks the source, and what decodes the streams and places pages.
These are tasks of trio, or one thread that does all of it. The lock :attr:`PostcopyReceiver.owner` keeps the tasks away while
that thread works. A page is placed once, atomically, and never touched by this process before: looking at an absent page would
make it a page of zeros for the guest as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import trio
from numpy.typing import NDArray

from ...errors import GuestFailed, RemoteProtocolError
from ...guest import PAGE_SIZE, MissingMemory, PageBitmap, Pages
from ...memory.faults import UffdMemory
from ...wire.events import PageRun, ZeroRun
from ...wire.postcopy import Runs, runs_of
from ...wire.return_path import PageRequest, encode

if TYPE_CHECKING:
    from ...monitor.statistics import Counters
    from ...wire.pages.sink import PageSink

#: Pages placed before other tasks get a turn, and requested pages theirs: a quarter of a millisecond.
TURN_PAGES: Final = 64
#: The same for pages of zeros.
_TURN_ZEROS: Final = 512

#: Begins the reason why a connection for urgent pages has ended.
URGENT_FAILED: Final = "the connection for urgent pages"


class PostcopyReceiver:
    """What is here, what is asked for, and how the rest comes.

    Args:
        memory: of the guest, open. It knows the blocks by their numbers in :attr:`trimig.guest.Guest.ram`.
        names: of the guest's blocks, in that order. The wire knows blocks by name, and the source may announce them in
            another order, so this is the one place where a name becomes a number.
        received: the pages that are here, by the block's name, in any order. This object's from here on.
        send: puts a message on the return path.
    """

    def __init__(
        self,
        memory: MissingMemory,
        names: Sequence[str],
        received: Mapping[str, PageBitmap],
        send: Callable[[bytes], Awaitable[None]],
        counters: Counters,
    ) -> None:
        self._memory = memory
        self._names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._received = tuple(received[name] for name in names)
        self._asked = tuple(np.zeros_like(bitmap) for bitmap in self._received)
        self._send = send
        self._counters = counters
        self._last: int | None = None
        self._whole = trio.Event()
        self._closed = False
        self._held = False  # the source may not be asked at present
        self.missing = sum(int(np.count_nonzero(~bitmap)) for bitmap in self._received)
        #: Held by the thread that uses this object, and by a task while it reads faults or places requested pages.
        self.owner = trio.Lock()
        self.look()

    @property
    def threadable(self) -> bool:
        """A thread may use the memory: it is trimig's own, and no code of the guest's program is called."""
        return isinstance(self._memory, UffdMemory)

    def fileno(self) -> int:
        """The descriptor that is readable when a thread of the guest waits. OSError if there is none."""
        return self._memory.fileno()

    @property
    def received(self) -> Mapping[str, PageBitmap]:
        """The pages that are here, by the block's name; not to be changed."""
        return dict(zip(self._names, self._received, strict=True))

    def wants(self, name: str, offset: int) -> bool:
        """The page at *offset* of block *name* was asked for, and is not here yet."""
        block, page = self._numbers[name], offset // PAGE_SIZE
        return bool(self._asked[block][page]) and not self._received[block][page]

    async def wait_whole(self) -> None:
        """Wait until nothing is missing.

        **Cancellation:** no effect.
        """
        await self._whole.wait()

    # -- faults --------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Ask for what the guest waits for, until cancelled or :meth:`close`.

        Raises:
            GuestFailed: its faults cannot be read.
            TransportFailed: the source cannot be asked.

        **Cancellation:** an access that waits goes on waiting; a request may have been cut.
        """
        while not self._closed:
            try:
                await trio.lowlevel.wait_readable(self._memory.fileno())
            except trio.ClosedResourceError:
                return
            async with self.owner:
                # It may have been closed by another task meanwhile.
                if not self.closed and (requests := self.requests()):
                    await self._send(requests)

    def requests(self) -> bytes:
        """The messages that ask for what the guest has begun to wait for since the last call. Never blocks. GuestFailed."""
        try:
            waits = self._memory.waits()
        except OSError as error:
            raise GuestFailed(f"the guest's page faults cannot be read: {error.strerror}") from error
        return b"".join([self.want(wait.block, wait.page) for wait in waits])

    @property
    def closed(self) -> bool:
        """:meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Nothing will come any more: close the memory, and end :meth:`serve`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # memory without waiting accesses has no descriptor
            trio.lowlevel.notify_closing(self._memory.fileno())
        self._memory.close()

    def hold(self) -> None:
        """The connection is lost. What the guest meets from here on is asked for by :meth:`ask_again`."""
        self._held = True

    async def ask_again(self) -> None:
        """On a new connection: ask for everything that the guest waits for, and has not come. TransportFailed.

        **Cancellation:** some of it was asked for.
        """
        self._held = False
        self._last = None  # the new connection's source has not heard a name yet
        for block, asked in enumerate(self._asked):
            for page in np.flatnonzero(asked & ~self._received[block]).tolist():
                await self._send(self._request(block, page))

    def want(self, block: int, page: int) -> bytes:
        """The guest waits for this page. Returns the message that asks for it; empty if it is not to be asked for. GuestFailed."""
        if self._received[block][page]:
            # It came as zero before the switch, so there is no memory behind it. Or it was placed between the fault and
            # this; then the access that waited goes on already, and nothing is changed.
            self._place_zeros(block, page, 1)
            return b""
        if self._asked[block][page]:
            return b""
        self._asked[block][page] = True
        self._counters.page_requests += 1
        return b"" if self._held else self._request(block, page)

    def _request(self, block: int, page: int) -> bytes:
        named, self._last = self._last != block, block
        request = PageRequest(block=self._names[block], start=page * PAGE_SIZE, length=PAGE_SIZE, named=named)
        return encode(request)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def sink(self, *, turns: bool) -> PageSink:
        """Where the pages of one connection go.

        The sink raises RemoteProtocolError for a page that is here already, and GuestFailed if a page cannot be placed.

        Args:
            turns: place pages in pieces that leave other tasks a turn, because another connection may bring a page
                that the guest waits for.
        """
        return _Sink(self, turns=turns)

    def place(self, run: PageRun | ZeroRun) -> Iterator[None]:
        """Place the pages of *run*, TURN_PAGES at most before each ``yield``. There others may place pages, too.

        Raises:
            RemoteProtocolError: a page is here already.
            GuestFailed: a page cannot be placed.
        """
        indices = run.offsets // PAGE_SIZE
        if isinstance(run, PageRun):
            yield from self.place_pages(run.block, indices, run.data)
        else:
            yield from self.place_fills(run.block, indices, run.fills)

    def place_pages(self, name: str, indices: NDArray[np.int64], data: Pages) -> Iterator[None]:
        """As :meth:`place`."""
        block = self._numbers[name]
        for start, stop in self._turns(block, indices, TURN_PAGES):
            self._place(block, int(indices[start]), stop - start, data[start:stop])
            self._counters.normal += stop - start
            yield

    def place_fills(self, name: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> Iterator[None]:
        """As :meth:`place`, for pages of one byte each."""
        block = self._numbers[name]
        for start, stop in self._turns(block, indices, _TURN_ZEROS):
            if not fills[start:stop].any():
                self._place(block, int(indices[start]), stop - start, None)
            else:
                for at in range(start, stop):
                    self._place(block, int(indices[at]), 1, np.full((1, PAGE_SIZE), fills[at], np.uint8))
            self._counters.duplicate += stop - start
            yield

    def _turns(self, block: int, indices: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
        """:meth:`_stretches` in pieces of at most *most* pages. Others may place pages before the next one is asked for."""
        again = False
        for first, end in self._stretches(block, indices):
            for start in range(first, end, most):
                stop = min(end, start + most)
                if again:
                    self._check_new(block, indices[start:stop])
                yield start, stop
                again = True

    def _stretches(self, block: int, indices: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Where in *indices* pages follow each other without a gap: positions of the first and behind the last.

        Raises:
            RemoteProtocolError: one of the pages is here already, or is in *indices* twice.
        """
        count = len(indices)
        if count == 1 and not self._received[block][indices[0]]:
            return [(0, 1)]
        self._check_new(block, indices)
        steps = indices[1:] - indices[:-1]
        if not np.count_nonzero(steps != 1):
            return [(0, count)]
        if int(steps.min()) <= 0:  # otherwise none can be there twice
            ordered = np.sort(indices)
            if (twice := ordered[:-1][ordered[1:] == ordered[:-1]]).size:
                raise self._second_time(block, int(twice[0]))
        cuts = (np.flatnonzero(steps != 1) + 1).tolist()
        return list(zip([0, *cuts], [*cuts, count], strict=True))

    def _check_new(self, block: int, indices: NDArray[np.int64]) -> None:
        here = self._received[block][indices]
        if np.count_nonzero(here):
            raise self._second_time(block, int(indices[int(here.argmax())]))

    def _second_time(self, block: int, page: int) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"page {page} of RAM block {self._names[block]!r} came a second time; in postcopy the guest may have written it "
            "since",
            section="ram",
        )

    def _place(self, block: int, first: int, count: int, data: Pages | None) -> None:
        if data is None:
            self._place_zeros(block, first, count)
        else:
            # Records lie between the pages of a run; a single page is not copied.
            with self._placing(block, first):
                self._memory.place(block, first, np.ascontiguousarray(data))
        self._received[block][first : first + count] = True
        self.missing -= count

    def _place_zeros(self, block: int, first: int, count: int) -> None:
        with self._placing(block, first):
            self._memory.place_zeros(block, first, count)

    @contextlib.contextmanager
    def _placing(self, block: int, first: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GuestFailed(
                f"page {first} of RAM block {self._names[block]!r} cannot be placed: {error.strerror}"
            ) from error

    def look(self) -> None:
        """Wake :meth:`wait_whole` if nothing is missing. Only for a task: a thread cannot wake tasks."""
        if not self.missing:
            self._whole.set()

    def missing_runs(self) -> Mapping[str, Runs]:
        """What is not here, by the block's name: rows of first page and the one behind the last."""
        return {
            name: runs_of(~bitmap) for name, bitmap in zip(self._names, self._received, strict=True) if not bitmap.all()
        }


def no_old_page(block: str, index: int) -> NDArray[np.uint8]:
    """Nothing is read: looking at an absent page would make it a page of zeros for the guest.

    Raises:
        RemoteProtocolError: always.
    """
    raise RemoteProtocolError(
        f"page {index} of RAM block {block!r} came as a difference; in postcopy each page comes whole",
        section="ram",
    )


class _Sink:
    """See :meth:`PostcopyReceiver.sink`."""

    def __init__(self, receiver: PostcopyReceiver, *, turns: bool) -> None:
        self._receiver = receiver
        self._turns = turns

    async def pages(self, block: str, indices: NDArray[np.int64], data: Pages) -> None:
        """See :class:`trimig.wire.pages.sink.PageSink`.

        **Cancellation:** some pages have been placed, and count.
        """
        await self._drive(self._receiver.place_pages(block, indices, data))

    async def zeros(self, block: str, indices: NDArray[np.int64], fills: NDArray[np.uint8]) -> None:
        """See :class:`trimig.wire.pages.sink.PageSink`.

        **Cancellation:** as for :meth:`pages`.
        """
        await self._drive(self._receiver.place_fills(block, indices, fills))

    async def _drive(self, placing: Iterator[None]) -> None:
        for _ in placing:
            if self._turns:
                await trio.lowlevel.checkpoint()
        self._receiver.look()

    def read(self, block: str, index: int) -> NDArray[np.uint8]:
        """Raise RemoteProtocolError, see :func:`no_old_page`."""
        return no_old_page(block, index)
