"""Byte streams of anyio as channels."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Final, overload

import anyio
import anyio.abc
import trio

_READ_BYTES: Final = 1 << 16


@overload
def from_anyio(stream: anyio.abc.ByteStream) -> trio.abc.HalfCloseableStream: ...


@overload
def from_anyio(stream: anyio.abc.ByteSendStream) -> trio.abc.SendStream: ...


@overload
def from_anyio(stream: anyio.abc.ByteReceiveStream) -> trio.abc.ReceiveStream: ...


def from_anyio(
    stream: anyio.abc.ByteStream | anyio.abc.ByteSendStream | anyio.abc.ByteReceiveStream,
) -> trio.abc.HalfCloseableStream | trio.abc.SendStream | trio.abc.ReceiveStream:
    """Wrap a stream of anyio as a channel for :func:`trimig.migrate` and :func:`trimig.receive`, which then own it.

    The application must run anyio on its trio backend: a stream of an asyncio loop cannot be used from trio. A stream
    of one direction has no return path. The end of the stream and its errors become trio's.

    Raises:
        TypeError: the object is no stream, or a stream of something other than bytes.
    """
    sends = isinstance(stream, anyio.abc.ByteSendStream | anyio.abc.ByteStream)
    receives = isinstance(stream, anyio.abc.ByteReceiveStream | anyio.abc.ByteStream)
    if sends and receives:
        return _Both(stream)
    if sends:
        return _Sending(stream)
    if receives:
        return _Receiving(stream)
    raise TypeError(f"not a byte stream of anyio: {stream!r}")


@contextlib.contextmanager
def _as_trio() -> Generator[None, None, None]:
    """Raise errors of anyio as trio's. The cause is kept: it names the error of the operating system."""
    try:
        yield
    except anyio.ClosedResourceError as error:
        raise trio.ClosedResourceError(*error.args) from error
    except anyio.BusyResourceError as error:
        raise trio.BusyResourceError(*error.args) from error
    except (anyio.BrokenResourceError, anyio.EndOfStream) as error:
        raise trio.BrokenResourceError(*error.args) from (error.__cause__ or error)


class _Wrapped(trio.abc.AsyncResource):
    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._closed = False
        self._ended = False

    def _check(self, *, sending: bool = False) -> None:
        if self._closed or (sending and self._ended):  # anyio does not check this in every case
            raise trio.ClosedResourceError("this stream has been closed")

    async def aclose(self) -> None:
        self._closed = True
        with _as_trio():
            await self._inner.aclose()


class _Sending(_Wrapped, trio.abc.SendStream):
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._check(sending=True)
        with _as_trio():
            # anyio's interface takes bytes, and the engine gives a view of a buffer that it uses again.
            await self._inner.send(data if isinstance(data, bytes) else bytes(data))
            if not data:  # anyio may return without a checkpoint for empty data
                await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        self._check(sending=True)
        await trio.lowlevel.checkpoint()  # returning at once is always allowed


class _Receiving(_Wrapped, trio.abc.ReceiveStream):
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._check()
        with _as_trio():
            try:
                return bytes(await self._inner.receive(_READ_BYTES if max_bytes is None else max_bytes))
            except anyio.EndOfStream:
                return b""


class _Both(_Sending, _Receiving, trio.abc.HalfCloseableStream):
    async def send_eof(self) -> None:
        self._check()
        self._ended = True
        with _as_trio():
            await self._inner.send_eof()
            await trio.lowlevel.checkpoint()  # anyio may return without a checkpoint
