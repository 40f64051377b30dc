"""The messages between trimig and a worker: round trips, and any bytes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.guests.worker.messages import (
    MAX_BODY,
    MAX_LINE,
    MAX_PACKET,
    MOST_QUOTED,
    Nonsense,
    WorkerReply,
    WorkerRequest,
    decimal,
    encode_reply,
    encode_request,
    parse_reply,
    parse_request,
    quoted,
)

WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
NUMBERS = st.integers(0, 10**19 - 1)
BODIES = st.binary(max_size=200)


@given(NUMBERS, WORDS, st.lists(WORDS, max_size=8), BODIES)
def test_request_comes_back(number: int, verb: str, words: list[str], body: bytes) -> None:
    request = WorkerRequest(number, verb, tuple(words), body)
    assert parse_request(encode_request(request)) == request


@given(NUMBERS, st.lists(WORDS, max_size=8), BODIES)
def test_reply_comes_back(number: int, words: list[str], body: bytes) -> None:
    reply = WorkerReply(number, None, tuple(words), body)
    assert parse_reply(encode_reply(reply)) == reply


@given(NUMBERS, st.text(max_size=100))
def test_refusal_comes_back(number: int, reason: str) -> None:
    reply = WorkerReply(number, reason)
    if reason.isascii():
        assert parse_reply(encode_reply(reply)) == reply


PACKETS = st.binary(max_size=300) | st.binary(max_size=40).map(lambda more: b"1 ok" + more)


def complaint(parse: Callable[[bytes], object], packet: bytes) -> str:
    """What the parser says against *packet*; empty if it is a message."""
    try:
        parse(packet)
    except Nonsense as error:
        return str(error)
    return ""


@given(PACKETS)
def test_any_bytes_are_a_message_or_one_bounded_error(packet: bytes) -> None:
    for parse in (parse_reply, parse_request):
        text = complaint(parse, packet)
        assert len(text) < MOST_QUOTED * 4 + 200
        assert text.isprintable()
    if not complaint(parse_request, packet):
        assert encode_request(parse_request(packet)) == packet
    if not complaint(parse_reply, packet) and parse_reply(packet).refused is None:
        assert encode_reply(parse_reply(packet)) == packet


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"1 ok",
        b"\n",
        b"ok\n",
        b"1\n",
        b"1  ok\n",
        b" 1 ok\n",
        b"1 ok \n",
        b"01 ok\n",
        b"-1 ok\n",
        b"1 OK\n",
        b"1 error why\n",
        b"\xff ok\n",
        b"1 ok \xe9\n",
        b"99999999999999999999 ok\n",
        b"1 ok " + b"x" * MAX_LINE + b"\n",
        b"1 ok\n" + bytes(MAX_BODY + 1),
        b"1 ok\n" + bytes(MAX_PACKET),
    ],
)
def test_nonsense(packet: bytes) -> None:
    with pytest.raises(Nonsense):
        parse_reply(packet)


def test_largest_body_and_what_is_too_large() -> None:
    assert len(parse_reply(b"1 ok\n" + bytes(MAX_BODY)).body) == MAX_BODY
    with pytest.raises(ValueError, match="64512 is the most"):
        encode_request(WorkerRequest(1, "load", (), bytes(MAX_BODY + 1)))
    for word, why in (
        ("a b", "'a b' has a space; put it into the body"),
        ("", "'' is empty"),
        ("é", "'é' is not printable ASCII"),
        ("a\n", "is not printable ASCII"),
        ("x" * MAX_LINE, "a line of 1032 bytes; 1024 is the most"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)):
            encode_request(WorkerRequest(1, "x-me", (word,)))
    with pytest.raises(Nonsense, match="without a verb"):
        parse_request(b"1\n")


def test_quotation_is_one_short_line() -> None:
    assert quoted(b"two\nlines\x1b[0m") == "'two lines?[0m'"
    assert len(quoted("x" * 10_000)) <= MOST_QUOTED + 3
    assert decimal("0") == 0
