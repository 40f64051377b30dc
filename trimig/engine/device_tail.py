"""Splits the devices of an unknown machine at the destination, in pieces between which other tasks get their turn.

The tail of a stream may have hundreds of millions of bytes. One piece of the work takes at most about ten milliseconds,
so a cancellation takes effect soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ..channel.offload import check_cancelled, offload
from ..errors import RemoteProtocolError
from ..guest import PAGE_SIZE, DeviceSection
from ..wire.constants import Section
from ..wire.devices.description import Description, Limits, parse
from ..wire.devices.sections import SplitTail, TailSplitter
from ..wire.devices.tail import TailBuffer
from ..wire.refusals import wrong_page_size

if TYPE_CHECKING:
    from ..config.config import Config
    from ..wire.devices.decoding import Pieces

T = TypeVar("T")

#: A longer description is parsed in a thread, because parsing takes a second for some MiB.
INLINE_BYTES: Final = 256 * 1024
#: Problems that are reported one by one; the others are only counted.
_TOLD: Final = 20


def buffer(config: Config | None = None, *, footers: bool) -> TailBuffer:
    """A buffer for the tail of a stream. With *config* its limits apply; a stream in a file has none (None)."""
    if config is None:
        return TailBuffer(footers=footers, inline_bytes=INLINE_BYTES)
    limits = Limits(max_bytes=config.max_description_bytes)
    return TailBuffer(footers=footers, max_bytes=config.max_device_bytes, limits=limits, inline_bytes=INLINE_BYTES)


async def in_pieces(work: Pieces[T]) -> T:
    """Do *work* with a checkpoint after each piece, and return its result.

    **Cancellation:** the work is given up.
    """
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
        await trio.lowlevel.checkpoint()


async def split_package(data: bytes, at: int, *, footers: bool, damaged: bool = False) -> SplitTail:
    """Split *data*, the package at byte *at* of the stream, into devices and commands; errors as for :func:`split`.

    **Cancellation:** no effect.
    """
    package = TailBuffer(footers=footers, max_bytes=len(data) + 1, described=False)
    package.feed(data)
    package.feed(bytes((Section.EOF,)))
    return await split(package, at, damaged=damaged)


async def check_description(text: bytes, at: int, config: Config) -> None:
    """Raise RemoteProtocolError unless *text*, which follows the devices of a known machine, is a description.

    Args:
        at: its offset in the stream.

    **Cancellation:** no effect.
    """
    limits = Limits(max_bytes=config.max_description_bytes)
    found = await offload(_parse_long, text, limits) if len(text) > INLINE_BYTES else _parse(text, limits)
    if isinstance(found, RemoteProtocolError):
        raise RemoteProtocolError(found.reason, offset=at, section=found.section)


async def feed(tail: TailBuffer, data: bytes) -> None:
    """Give *data* to *tail*. RemoteProtocolError.

    **Cancellation:** the tail must be given up.
    """
    tail.feed(data)
    while (text := tail.undecided) is not None:
        tail.judge(await offload(_parse_long, text, tail.limits))


def _parse_long(text: bytes, limits: Limits) -> Description | RemoteProtocolError:
    return _parse(text, limits, check_cancelled)


def _parse(text: bytes, limits: Limits, between: Callable[[], None] | None = None) -> Description | RemoteProtocolError:
    try:
        return parse(text, limits, between=between)
    except RemoteProtocolError as error:
        return error


async def split(tail: TailBuffer, at: int, *, damaged: bool = False, early: Sequence[DeviceSection] = ()) -> SplitTail:
    """Split *tail*, which begins at byte *at* of its stream; errors as for :meth:`TailSplitter.result`.

    **Cancellation:** the tail must be given up.
    """
    splitter = TailSplitter(tail, offset=at, damaged=damaged, early=early)
    if tail.description is not None and tail.description.page_size != PAGE_SIZE and not damaged:
        raise wrong_page_size(tail.description.page_size)
    while not splitter.step():
        await trio.lowlevel.checkpoint()
    return splitter.result()


def first_problems(of: SplitTail) -> Sequence[str]:
    """The problems to report. A hostile tail can have tens of thousands, so the list is cut."""
    if len(of.problems) <= _TOLD:
        return of.problems
    return (*of.problems[:_TOLD], f"{len(of.problems) - _TOLD} more problems of this kind")
