"""The devices of an unknown machine on the destination: told apart in pieces, between which other tasks get their turn.

What a tail costs is bounded by its bytes, but it may have hundreds of millions of them. No piece of the work takes longer
than some ten milliseconds, so a cancellation is never deaf for long.
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
from ..wire.pages.size import wrong_page_size

if TYPE_CHECKING:
    from ..config.config import Config
    from ..wire.devices.decoding import Pieces

T = TypeVar("T")

#: A longer text is parsed in a thread: that takes a second for some MiB, unless it is cancelled.
INLINE_BYTES: Final = 256 * 1024
#: Problems that are told one by one.
_TOLD: Final = 20


def buffer(config: Config | None = None, *, footers: bool) -> TailBuffer:
    """A buffer for the tail of a live stream, or of one in a file (without *config*)."""
    if config is None:
        return TailBuffer(footers=footers, inline_bytes=INLINE_BYTES)
    limits = Limits(max_bytes=config.max_description_bytes)
    return TailBuffer(footers=footers, max_bytes=config.max_device_bytes, limits=limits, inline_bytes=INLINE_BYTES)


async def in_pieces(work: Pieces[T]) -> T:
    """The result of *work*; a checkpoint after each piece of it.

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
    """Cut up the devices and commands of a package, *data*, which stands at byte *at* of the stream; errors as :func:`split`.

    **Cancellation:** no effect.
    """
    package = TailBuffer(footers=footers, max_bytes=len(data) + 1, described=False)
    package.feed(data)
    package.feed(bytes((Section.EOF,)))
    return await split(package, at, damaged=damaged)


async def check_description(text: bytes, config: Config) -> None:
    """Whether the text behind the devices of a known machine is a description. RemoteProtocolError.

    **Cancellation:** no effect.
    """
    limits = Limits(max_bytes=config.max_description_bytes)
    found = await offload(_parse_long, text, limits) if len(text) > INLINE_BYTES else _parse(text, limits)
    if isinstance(found, RemoteProtocolError):
        raise found


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
    """Cut up the tail of a stream that begins at byte *at* of it; errors as for :meth:`TailSplitter.result`.

    **Cancellation:** the tail must be given up.
    """
    splitter = TailSplitter(tail, offset=at, damaged=damaged, early=early)
    if tail.description is not None and tail.description.page_size != PAGE_SIZE and not damaged:
        raise wrong_page_size(tail.description.page_size)
    while not splitter.step():
        await trio.lowlevel.checkpoint()
    return splitter.result()


def first_problems(of: SplitTail) -> Sequence[str]:
    """What is to be told of a tail: a hostile one can have tens of thousands of problems."""
    if len(of.problems) <= _TOLD:
        return of.problems
    return (*of.problems[:_TOLD], f"{len(of.problems) - _TOLD} more problems of this kind")
