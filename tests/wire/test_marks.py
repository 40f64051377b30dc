"""The marks between trimigs: forms, bounds, and that nothing of them is legal before the two have met."""

from __future__ import annotations

import pytest

from trimig.errors import RemoteProtocolError
from trimig.wire import Decoder, encoder
from trimig.wire import events as ev
from trimig.wire.marks import (
    MAX_REASON,
    PONG_MARK,
    Mark,
    reason_bytes,
    shown_reason,
    trailing_reason,
    wrong_length,
)
from trimig.wire.return_path import Attempt, Clock, Message, Pong, Reason, ReturnPathDecoder, encode

MESSAGES: list[Message] = [Reason(payload=b"no room"), Attempt(id=bytes(range(16))), Clock(microseconds=1 << 40)]
HEAD = encoder.file_header() + encoder.configuration("m", ())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_whatever_the_pieces(message: Message) -> None:
    data = encode(Pong(value=PONG_MARK)) + encode(message)
    for cut in range(len(data) + 1):
        decoder = ReturnPathDecoder({}, marks=True)
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == [Pong(value=PONG_MARK), message]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("before", [b"", encode(Pong(value=1))], ids=["nothing", "another PONG"])
def test_messages_are_refused_before_the_mark_is_answered(message: Message, before: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="invalid return-path message type 0x740"):
        ReturnPathDecoder({}, marks=True).feed(before + encode(message))
    with pytest.raises(RemoteProtocolError, match="invalid return-path message type 0x740"):
        ReturnPathDecoder({}).feed(encode(Pong(value=PONG_MARK)) + encode(message))


@pytest.mark.parametrize(
    ("mark", "length", "legal"),
    [
        (Mark.REASON, 0, True),
        (Mark.REASON, 512, True),
        (Mark.REASON, 513, False),
        (Mark.CLOCK, 8, True),
        (Mark.CLOCK, 7, False),
        (Mark.ATTEMPT, 16, True),
        (Mark.ATTEMPT, 17, False),
    ],
)
def test_lengths_are_checked_before_the_payload_has_come(mark: Mark, length: int, legal: bool) -> None:
    assert (wrong_length(mark, length) is None) is legal
    decoder = Decoder(measure=None)
    decoder.accept_marks()
    decoder.feed(HEAD + encoder.command(mark, bytes(length))[:5])
    events = [type(decoder.next_event()), type(decoder.next_event())]
    assert events == [ev.FileHeader, ev.Configuration]
    back = ReturnPathDecoder({}, marks=True)
    back.feed(encode(Pong(value=PONG_MARK)))
    header = mark.to_bytes(2) + length.to_bytes(2)
    if legal:
        back.feed(header)
        decoder.next_event()
        return
    with pytest.raises(RemoteProtocolError, match=f"mark {mark.name} with {length} bytes"):
        back.feed(header)
    with pytest.raises(RemoteProtocolError, match=f"mark {mark.name} with {length} bytes"):
        decoder.next_event()


def test_commands_are_unknown_to_a_decoder_that_has_not_seen_the_mark() -> None:
    for mark in Mark:
        decoder = Decoder(measure=None)
        decoder.feed(HEAD + encoder.command(mark, bytes(16)))
        decoder.next_event()
        decoder.next_event()
        with pytest.raises(RemoteProtocolError, match="is newer than the commands known here"):
            decoder.next_event()


def test_a_reason_is_one_bounded_line_without_control_characters() -> None:
    assert shown_reason(reason_bytes("two\nlines\tof  text")) == "two lines of text"
    assert shown_reason(b"\x1b[31mred\x00\n\xff") == "\\x1b[31mred\\x00\\n\\xff"
    long = reason_bytes("ä" * 400)
    assert len(long) <= MAX_REASON
    assert shown_reason(long) == "ä" * 256


def test_a_reason_is_found_at_the_very_end_only() -> None:
    command = encoder.command(Mark.REASON, b"no room")
    assert trailing_reason(b"\x00" * 300 + command) == "no room"
    assert trailing_reason(command + b"\x00") is None
    assert trailing_reason(command[:-1]) is None
    assert trailing_reason(b"") is None
    # One that looks like another inside its text.
    assert trailing_reason(encoder.command(Mark.REASON, b"a\x08\x74\x01\x00\x09b")) == "a\\x08t\\x01\\x00\\tb"
