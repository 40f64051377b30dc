"""The one loop over the elements of a stream that comes from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .refusals import Unsupported

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .decoder import Decoder
    from .events import Element


class Elements:
    """The elements of a stream, one after the other.

    Args:
        decoder: gets the bytes read.
        read: fills a buffer with the next bytes, and returns their number; 0 at the end of the file.
    """

    def __init__(self, decoder: Decoder, read: Callable[[memoryview], Awaitable[int]]) -> None:
        self._decoder = decoder
        self._read = read
        self._ended = False

    async def next(self) -> Element | None:
        """The next element; None at the end of the file.

        Raises:
            RemoteProtocolError: the stream is malformed.
            TransportFailed: the stream ends too early.
            Unsupported: the file is empty.

        **Cancellation:** as for *read*; bytes may have been read that did not reach the decoder.
        """
        decoder = self._decoder
        while (event := decoder.next_event()) is None and not self._ended:
            count = await self._read(decoder.writable())
            decoder.received(count)
            if count:
                continue
            if not decoder.offset and not decoder.pending:
                raise Unsupported("the file is empty")
            decoder.receive_eof()
            self._ended = True
        return event
