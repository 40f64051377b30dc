"""The server's end of a websocket for control connections: receives text and binary messages one by one.

There is no background task, so an error of a client can only appear in the task that serves that client.
"""

from __future__ import annotations

import contextlib
from typing import Final

import trio

from ..channel import closing
from ._frames import CloseCode, FrameError, Header, Opcode, close_payload, mask, read_close, read_header
from ._layered import Below

_READ: Final = 1 << 14
#: Frames after which other tasks get a turn; only a hostile client sends so many small frames at once.
_TURN: Final = 100


class ConnectionGone(Exception):
    """The connection has ended: the client has closed it or broken the protocol, or the network has failed."""


class MessageStream:
    """The server's end of an open websocket. One task receives; any may send.

    Args:
        transport: is owned, and closed with this object.
        early: bytes that came behind the opening handshake.
        max_message: bytes of a message, at most.
    """

    def __init__(self, transport: trio.abc.Stream, *, early: bytes, max_message: int) -> None:
        self._below = Below(transport)
        self._buffer = bytearray(early)
        self._max = max_message
        self._close_sent = False
        self._ended = False

    async def receive(self) -> str | bytes:
        """The next message: str for a text message.

        Raises:
            ConnectionGone: there are no more messages.

        **Cancellation:** the connection can only be closed.
        """
        try:
            return await self._receive()
        except FrameError as error:
            await self._say_close(error.code, str(error))
            raise ConnectionGone(f"the client broke the websocket protocol: {error}") from error

    async def _receive(self) -> str | bytes:
        kind: Opcode | None = None
        message = bytearray()
        frames = 0
        while True:
            if frames % _TURN == 0:
                await trio.lowlevel.checkpoint()
            frames += 1
            frame, payload = await self._next_frame(self._max - len(message))
            if frame.is_control:
                await self._control(frame.opcode, payload)
                continue
            if (frame.opcode is Opcode.CONTINUATION) is not (kind is not None):
                raise FrameError(
                    CloseCode.PROTOCOL_ERROR, "a fragment that belongs to no message, or a message in another"
                )
            kind = kind or frame.opcode
            message += payload
            if not frame.final:
                continue
            if kind is not Opcode.TEXT:
                return bytes(message)
            try:
                return message.decode()
            except UnicodeDecodeError as error:
                raise FrameError(CloseCode.INVALID, f"a text message that is not UTF-8 at byte {error.start}") from None

    async def _next_frame(self, room: int) -> tuple[Header, bytes]:
        """The next frame, whole; a frame with more than *room* bytes of a message is refused before they are read."""
        while (found := self._header()) is None:
            await self._fill()
        frame, start = found
        if not frame.is_control and frame.length > room:
            raise FrameError(CloseCode.TOO_BIG, f"a message of more than {self._max} bytes")
        while len(self._buffer) < start + frame.length:
            await self._fill()
        payload = self._buffer[start : start + frame.length]
        del self._buffer[: start + frame.length]
        if payload:
            mask(memoryview(payload), frame.key)
        return frame, bytes(payload)

    def _header(self) -> tuple[Header, int] | None:
        with memoryview(self._buffer) as view:
            return read_header(view, from_client=True)

    async def _fill(self) -> None:
        try:
            data = await self._below.stream.receive_some(_READ)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionGone("the connection broke") from error
        if not data:
            raise ConnectionGone("the connection was cut")
        self._buffer += data

    async def _control(self, opcode: Opcode, payload: bytes) -> None:
        if opcode is Opcode.PING and not self._close_sent:
            await self._send(Opcode.PONG, payload)
        elif opcode is Opcode.CLOSE:
            self._ended = True
            code, _ = read_close(payload)
            await self._say_close(CloseCode.NORMAL if code == CloseCode.NONE else code, "")
            raise ConnectionGone(f"the client closed the websocket with code {code}")

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(self, message: str | bytes) -> None:
        """Send one message.

        Raises:
            ConnectionGone: the message cannot be sent any more.

        **Cancellation:** nothing more can be sent.
        """
        if isinstance(message, str):
            await self._send(Opcode.TEXT, message.encode())
        else:
            await self._send(Opcode.BINARY, message)

    async def _send(self, opcode: Opcode, payload: bytes) -> None:
        head = Header(opcode=opcode, final=True, length=len(payload)).encode()
        async with self._below.writing:
            if self._close_sent and opcode is not Opcode.CLOSE:
                raise ConnectionGone("the websocket is closed")
            try:
                await self._below.write(head + payload)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionGone("the connection broke") from error

    async def _say_close(self, code: int, words: str) -> None:
        if self._close_sent:
            return
        self._close_sent = True
        with contextlib.suppress(ConnectionGone):
            await self._send(Opcode.CLOSE, close_payload(code, words))

    async def goodbye(self, seconds: float) -> None:
        """Send a CLOSE, and wait for the client's CLOSE; together at most *seconds*.

        **Cancellation:** the connection can only be closed.
        """
        with trio.move_on_after(seconds), contextlib.suppress(ConnectionGone, FrameError):
            await self._say_close(CloseCode.NORMAL, "")
            while not self._ended:
                await self._receive()

    async def aclose(self) -> None:
        """Close at once.

        **Cancellation:** the connection is closed all the same.
        """
        await closing.close(self._below.stream)
