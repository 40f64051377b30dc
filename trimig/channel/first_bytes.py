"""How the first bytes of a connection tell its kind: the judges of a :class:`.lobby.Lobby`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Final

from ..errors import RemoteProtocolError
from ..wire import events as ev
from ..wire.constants import Command, Section
from ..wire.decoder import Decoder
from ..wire.marks import Mark, is_mark, wrong_length
from ..wire.pages import multifd
from .lobby import MOST_READ, Judge, NotTheOne, NotWanted, Verdict

if TYPE_CHECKING:
    from ..config.config import Config
    from .channels import Beside

#: Behind a page record's word and name there is a page; the decoder's buffer holds more than a judge is ever given.
_BUFFER: Final = 2 * MOST_READ
_COMMAND: Final = struct.Struct(">BHH")

_HTTP: Final = (b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"DELE", b"PATC", b"TRAC")


def known(data: bytes) -> NotTheOne | None:
    """The verdict on a connection whose first bytes are those of another protocol, if *data* says so."""
    first = data[:4]
    if first == multifd.MAGIC:
        return NotWanted(
            "it is a channel of multifd",
            "the source has the capability multifd on, and it is off at the destination: turn it on there, or turn multifd off at the source",
        )
    if data[:2] == b"\x16\x03":
        return NotTheOne(
            "it begins with a TLS handshake, and TLS is off at the destination",
            "the source has TLS on, and the destination has not: set tls-creds there, or take it away at the source",
        )
    if first in _HTTP:
        return NotTheOne(
            "it is an HTTP request", "an HTTP request came; a source that uses a websocket needs a ws: address here"
        )
    return None


def judge_first(config: Config, beside: Sequence[Beside], check: Callable[[ev.Configuration], None]) -> Judge:
    """The main connection: the header, and a configuration section that *check* accepts.

    A stream of a machine type without that section is known by its header and the section behind it. A stranger who
    copies both is taken for the source: only TLS tells them apart.

    Args:
        beside: other connections of the source, which may come before the main one.
        check: raises RemoteProtocolError for a configuration that does not fit.
    """

    def judge(data: bytes) -> Verdict:
        if (verdict := _of_beside(data, beside)) is not None:
            return verdict
        if (refusal := known(data)) is not None:
            raise refusal
        decoder = Decoder(
            measure=None,
            configuration=config.peer.send_configuration,
            footers=config.peer.send_section_footer,
            buffer_bytes=_BUFFER,
        )
        decoder.feed(data)
        while (event := decoder.next_event()) is not None:
            if isinstance(event, ev.Configuration):
                check(event)
                return Verdict.YES
            if not isinstance(event, ev.FileHeader):
                return Verdict.YES
        return Verdict.MORE

    return judge


def judge_second(main: Decoder, wants: Callable[[str, int], bool], ended: Callable[[], None]) -> Judge:
    """The second connection of postcopy-preempt: a record of a page, with the name of a block and inside of it.

    The source sends a page there because it was asked for. So a connection that brings another one is taken only if no
    other is there: a stranger can know the names of blocks, but hardly what the guest waits for.

    Args:
        main: has read the list of blocks.
        wants: whether the page at that offset of that block was asked for.
        ended: called when the end word comes before any page: a second connection that was never needed.
    """

    def judge(data: bytes) -> Verdict:
        if (refusal := known(data)) is not None:
            raise refusal
        decoder = Decoder(measure=None, continues=main, records_only=True, buffer_bytes=_BUFFER)
        decoder.feed(data)
        match event := decoder.next_event():
            case ev.PageElement():
                return Verdict.YES if wants(event.block, int(event.offsets[0])) else Verdict.ALONE
            case ev.RamEnd():
                ended()
        return Verdict.MORE

    return judge


def judge_again(blocks: Container[str]) -> Judge:
    """A connection in a paused postcopy: it asks which pages of a block are here. PINGs may stand before that.
    Whether it is the same migration's is found out when it has been chosen: a trimig is told why it is refused.

    Args:
        blocks: names of the guest's blocks.
    """

    def judge(data: bytes) -> Verdict:
        if (refusal := known(data)) is not None:
            raise refusal
        at = 0
        while len(data) - at >= 1:
            if data[at] != Section.COMMAND:
                raise NotTheOne(
                    f"byte {at} is {data[at]:#04x}: it does not begin as the source of a paused migration does"
                )
            if len(data) - at < _COMMAND.size:
                return Verdict.MORE
            _, number, length = _COMMAND.unpack_from(data, at)
            payload = data[at + _COMMAND.size : at + _COMMAND.size + length]
            complete = len(payload) == length
            if number == Command.RECV_BITMAP:
                if length > 256:
                    raise NotTheOne(f"RECV_BITMAP with {length} bytes at byte {at}")
                if not complete:
                    return Verdict.MORE
                return _asks_for(payload, blocks, at)
            if not (number == Command.PING and length == 4) and not (
                is_mark(number) and wrong_length(Mark(number), length) is None
            ):
                raise NotTheOne(
                    f"command {number:#06x} at byte {at}: it does not begin as the source of a paused migration does"
                )
            if not complete:
                return Verdict.MORE
            at += _COMMAND.size + length
        return Verdict.MORE

    return judge


def _asks_for(payload: bytes, blocks: Container[str], at: int) -> Verdict:
    name = payload[1:].decode("utf-8", "surrogateescape")
    if not payload or payload[0] != len(payload) - 1 or name not in blocks:
        raise NotTheOne(f"RECV_BITMAP at byte {at} for {name!r}, which is no RAM block of this guest")
    return Verdict.YES


def judge_other(beside: Sequence[Beside]) -> Judge:
    """The connections that come once there is a main one.

    A connection that is not wanted may still show why the migration is going to fail: a channel of multifd comes from a
    source that has other settings. A connection of another protocol has nothing to do with the source.

    Args:
        beside: the connections that are wanted.
    """

    def judge(data: bytes) -> Verdict:
        if (verdict := _of_beside(data, beside)) is not None:
            return verdict
        refusal = known(data)
        if refusal is None and beside:
            return Verdict.ALONE
        if refusal is None:
            raise NotTheOne("the migration has its source already")
        raise refusal if data[:4] == multifd.MAGIC else NotTheOne(str(refusal))

    return judge


def judge_data(check: Callable[[bytes], None], *, others: bool) -> Judge:
    """A data channel of multifd: it begins with a hello that *check* accepts.

    Args:
        check: gets a hello, and raises RemoteProtocolError with the reason if the channel is not wanted.
        others: further connections are wanted, which have no magic; they wait.
    """

    def judge(data: bytes) -> Verdict:
        if not data.startswith(multifd.MAGIC[: len(data)]):
            if (refusal := known(data)) is not None:
                raise NotTheOne(str(refusal))
            if others:
                return Verdict.LATER
            raise NotTheOne("the migration has its source already")
        if len(data) < multifd.HELLO_BYTES:
            return Verdict.MORE
        try:
            check(data[: multifd.HELLO_BYTES])
        except RemoteProtocolError as error:
            raise NotWanted(
                f"it is a channel of multifd, {error.reason}", f"a connection was refused: {error.reason}"
            ) from None
        return Verdict.YES

    return judge


def _of_beside(data: bytes, beside: Sequence[Beside]) -> Verdict | None:
    """The verdict on a connection that begins as one that is wanted beside the main one; None if it does not."""
    magics = [wanted.magic for wanted in beside if wanted.magic]
    if any(data.startswith(magic) for magic in magics):
        return Verdict.LATER
    return Verdict.MORE if any(magic.startswith(data) for magic in magics) else None
