"""A byte stream in the binary messages of a websocket, over any stream of both directions.

The boundaries of messages have no meaning; a long write becomes several messages. There is no background task: the
receiving task also answers pings, and the next sending task sends what is due to the peer. The opening handshake is
in ``_opening``; single messages, for the control connections, are in ``_messages``.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import Final

import trio
from wsproto.events import Request

from .. import formats
from ..channel.lobby import Certified
from ..channel.socket_options import enlarge
from ..errors import TransportFailed
from ._frames import (
    MAX_HEADER,
    CloseCode,
    FrameError,
    Header,
    Opcode,
    close_payload,
    mask,
    mask_into,
    read_close,
    read_header,
)
from ._layered import HANDSHAKE_SECONDS, READ_BYTES, LayeredStream, closed_on_failure, text_of
from ._opening import NotUnderstood, from_a_page, knock, welcome

#: The largest payload of a sent frame.
FRAME_SIZE: Final = 1 << 20
#: The longest accepted message. A message is never held in memory, but there is no reason for a longer one.
MAX_MESSAGE: Final = 1 << 30
#: A payload of at least this size is not read ahead but straight into the caller's buffer.
_DIRECT: Final = 1 << 16
#: Frames in one piece of input after which other tasks get a turn; only a hostile peer sends such small frames.
_TURN: Final = 200
#: Seconds for sending the CLOSE, or for waiting for the peer's.
_CLOSE_SECONDS: Final = 0.5


class WebSocketStream(LayeredStream):
    """One end of an open websocket; :func:`open_client` and :func:`open_server` make them.

    Args:
        transport: is owned, and closed with this stream.
        client: which end this is; the client masks the frames that it sends.
        early: bytes that came behind the opening handshake.
    """

    def __init__(self, transport: trio.abc.Stream, *, client: bool, early: bytes = b"") -> None:
        super().__init__(transport, "websocket")
        if self._below.socket is not None:
            enlarge(self._below.socket)
        self._client = client
        self._raw = memoryview(bytearray(max(READ_BYTES, len(early))))
        self._raw[: len(early)] = early
        self._begin, self._end = 0, len(early)  # the bytes in the buffer that are not parsed yet
        self._frame = Header(opcode=Opcode.CONTINUATION, final=True, length=0)
        self._place = 0  # in the payload of this frame
        self._message: int | None = None  # bytes of the message that is being received
        self._staging = memoryview(bytearray(0))
        self._pong: bytes | None = None
        self._close_sent = False
        self._ended = False  # the peer sent a CLOSE in order

    def peer_certificate(self) -> bytes | None:
        """As for TLS, if TLS is below; None otherwise."""
        return self.transport.peer_certificate() if isinstance(self.transport, Certified) else None

    # -- frames going out ----------------------------------------------------------------------------------------------

    async def _send_frame(self, opcode: Opcode, payload: bytes | memoryview) -> None:
        """Send one frame; the caller holds the lock."""
        await self._below.write(self._encode(opcode, payload))

    def _encode(self, opcode: Opcode, payload: bytes | memoryview) -> memoryview:
        """Header and payload in one buffer, masked there, where the payload is aligned."""
        size = len(payload)
        if len(self._staging) < size + 16:
            self._staging = memoryview(bytearray(size + 16))
        # A new, unpredictable key for each frame: masks have no other purpose.
        key = secrets.token_bytes(4) if self._client else b""
        head = Header(opcode=opcode, final=True, length=size, key=key).encode()
        start = 16 - len(head)
        self._staging[start:16] = head
        if key:
            mask_into(self._staging[16 : 16 + size], memoryview(payload), key)
        else:
            self._staging[16 : 16 + size] = payload
        return self._staging[start : 16 + size]

    async def _answer(self) -> None:
        """Send the pong that is due; the caller holds the lock."""
        if self._pong is not None and not self._close_sent:
            payload, self._pong = self._pong, None
            await self._send_frame(Opcode.PONG, payload)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*, in frames of at most FRAME_SIZE.

        **Cancellation:** a part may have been sent; nothing more can be sent.
        """
        with self._sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_whole()
            if self._close_sent:
                raise trio.BrokenResourceError("the peer has closed this websocket")
            view = memoryview(data).cast("B")
            if not view:
                await trio.lowlevel.cancel_shielded_checkpoint()
            try:
                for start in range(0, len(view), FRAME_SIZE):
                    async with self._below.writing:
                        await self._send_frame(Opcode.BINARY, view[start : start + FRAME_SIZE])
                        await self._answer()
            except trio.BrokenResourceError as error:
                self._check_open(error)
                raise

    # -- frames coming in ----------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        """Read more bytes behind those in the buffer."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif len(self._raw) - self._end < MAX_HEADER + 256:
            rest = self._raw[self._begin : self._end].tobytes()
            self._raw[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        self._end += await self._read(self._raw[self._end :])

    async def _read(self, room: memoryview) -> int:
        """Receive from the stream below into *room*; at least one byte."""
        count = await self._below.read_into(room)
        if not count:
            raise trio.BrokenResourceError("the connection was cut (it ended without the end of the websocket)")
        return count

    async def receive_into(self, view: memoryview) -> int:
        """Like :meth:`receive_some`, into *view*; returns the number of bytes, 0 at the end.

        **Cancellation:** nothing was taken. If a pong was being sent at that moment, nothing can be sent any more.
        """
        with self._receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_whole()
            try:
                count = await self._receive(view)
            except FrameError as error:
                self._failure = ConnectionError(f"the peer broke the websocket protocol: {error}")
                await self._say_close(error.code, str(error))
                self._fail(self._failure)
            except trio.BrokenResourceError as error:
                self._check_open(error)
                raise
            await trio.lowlevel.cancel_shielded_checkpoint()
            return count

    async def _receive(self, view: memoryview) -> int:
        frames = 0
        while not self._ended:
            if done := self._gather(view):
                return done
            found = self._next_header()
            if found is not None and await self._enter(*found):
                frames += 1
                if frames % _TURN == 0:
                    await trio.lowlevel.checkpoint()
                continue
            if self._pong is not None and not self._below.writing.locked():
                async with self._below.writing:
                    await self._answer()
            left = self._frame.length - self._place
            if self._begin == self._end and min(left, len(view)) >= _DIRECT:
                count = await self._read(view[:left])
                self._unmask(view[:count])
                return count
            await self._fill()
        return 0

    def _next_header(self) -> tuple[Header, int] | None:
        """The header of the next frame, if the present frame is over and the buffer has enough of the next."""
        if self._place < self._frame.length:
            return None
        return read_header(self._raw[self._begin : self._end], from_client=not self._client)

    def _gather(self, view: memoryview) -> int:
        """Return payload from the buffer, of several frames in a row; the number of bytes."""
        done = 0
        while done < len(view):
            left = self._frame.length - self._place
            if left and self._begin < self._end:
                done += self._take(view[done:], left)
                continue
            if not done or left:
                break
            try:
                found = self._next_header()
                if found is None or found[0].is_control:
                    break
                self._start(*found)
            except FrameError:
                break  # the data before the error is valid; the next call raises the error
        return done

    def _take(self, view: memoryview, left: int) -> int:
        """Return payload from the buffer."""
        size = min(left, self._end - self._begin, len(view))
        part = view[:size]
        part[:] = self._raw[self._begin : self._begin + size]
        self._begin += size
        self._unmask(part)
        return size

    def _unmask(self, part: memoryview) -> None:
        """Unmask *part*, the next piece of the payload."""
        if self._frame.key:
            mask(part, self._frame.key, self._place)
        self._place += len(part)

    async def _enter(self, frame: Header, size: int) -> bool:
        """Begin with *frame*, whose header takes *size* bytes; False if a control frame is incomplete."""
        if frame.is_control:
            at = self._begin + size
            if self._end - at < frame.length:
                return False
            payload = bytearray(self._raw[at : at + frame.length])
            if frame.key and payload:
                mask(memoryview(payload), frame.key)
            self._begin = at + frame.length
            await self._control(frame.opcode, bytes(payload))
            return True
        self._start(frame, size)
        return True

    def _start(self, frame: Header, size: int) -> None:
        """Begin with the data in *frame*."""
        if frame.opcode is Opcode.TEXT:
            raise FrameError(CloseCode.UNSUPPORTED, "a text message, where only binary ones make a stream")
        if (frame.opcode is Opcode.CONTINUATION) is not (self._message is not None):
            raise FrameError(CloseCode.PROTOCOL_ERROR, "a fragment that belongs to no message, or a message in another")
        total = (self._message or 0) + frame.length
        if total > MAX_MESSAGE:
            raise FrameError(CloseCode.TOO_BIG, f"a message of more than {MAX_MESSAGE} bytes")
        self._message = None if frame.final else total
        self._frame, self._place = frame, 0
        self._begin += size

    async def _control(self, opcode: Opcode, payload: bytes) -> None:
        if opcode is Opcode.PING:
            self._pong = payload  # only the last ping needs an answer
        elif opcode is Opcode.CLOSE:
            code, words = read_close(payload)
            await self._say_close(CloseCode.NORMAL if code == CloseCode.NONE else code, "")
            if self._message is not None or code not in (CloseCode.NORMAL, CloseCode.GOING_AWAY, CloseCode.NONE):
                behind = f": {words[:200]}" if words else ""
                self._fail(ConnectionError(f"the peer closed the websocket with code {code}{behind}"))
            self._ended = True

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _say_close(self, code: int, words: str) -> None:
        """Send a CLOSE, unless that is impossible or takes too long."""
        if self._close_sent or self._below.cut or self._below.writing.locked():
            return
        self._close_sent = True
        await self._below.write_last(self._encode(Opcode.CLOSE, close_payload(code, words)), _CLOSE_SECONDS)

    async def announce_end(self) -> None:
        """Send a CLOSE, and wait for a moment for the peer's.

        **Cancellation:** the stream can only be closed.
        """
        await self._say_close(CloseCode.NORMAL, "")
        if not (self._receiving.inside or self._ended or self._failure or self._below.cut):
            await self._wait_end()

    async def _wait_end(self) -> None:
        """Read the rest: if a socket is closed with unread input, TCP sends a reset, which can overtake the last bytes
        sent."""
        scratch = memoryview(bytearray(1 << 14))
        expected = (trio.BrokenResourceError, trio.ClosedResourceError, FrameError)
        with trio.move_on_after(_CLOSE_SECONDS), contextlib.suppress(*expected):
            while await self._receive(scratch):
                pass


# -- the opening handshake ---------------------------------------------------------------------------------------------


async def open_client(transport: trio.abc.Stream, host: str, target: str, where: str) -> WebSocketStream:
    """Ask the server *host* for *target*: a websocket over *transport*. *transport* is closed on every path but
    success.

    Raises:
        ConfigError: the host cannot be written in a request.
        TransportFailed: the server refused, is no websocket server, or took too long.

    **Cancellation:** *transport* is closed.
    """
    async with closed_on_failure(transport):
        with trio.move_on_after(HANDSHAKE_SECONDS):
            try:
                early = await knock(transport, host, target, where)
            except (trio.BrokenResourceError, NotUnderstood) as error:
                raise TransportFailed(f"no websocket at {where}: {text_of(error)}") from error
            return WebSocketStream(transport, client=True, early=early)
        raise TransportFailed(f"no websocket at {where}: no answer within {formats.duration(HANDSHAKE_SECONDS)}")


async def open_server(
    transport: trio.abc.Stream, path: str, where: str, *, seconds: float = HANDSHAKE_SECONDS
) -> WebSocketStream:
    """Accept a websocket over *transport* from a client that asks for one.

    Args:
        path: the path that the client must ask for; any if empty.
        seconds: for the handshake.

    Raises:
        TransportFailed: the client asked for something else, sent no request, or took too long. The client has been
            told.

    **Cancellation:** *transport* is closed.
    """

    def judge(request: Request) -> tuple[int, str] | None:
        if path and request.target.partition("?")[0] != path:
            return 404, f"it asks for {request.target[:200]!r}, and here is {path!r}"
        return (403, "it comes from a page in a browser") if from_a_page(request) else None

    async with closed_on_failure(transport):
        with trio.move_on_after(seconds):
            try:
                early = await welcome(transport, judge)
            except (trio.BrokenResourceError, NotUnderstood) as error:
                raise TransportFailed(f"no websocket with the client at {where}: {text_of(error)}") from error
            return WebSocketStream(transport, client=False, early=early)
        raise TransportFailed(f"no websocket with the client at {where}: no request within {formats.duration(seconds)}")
