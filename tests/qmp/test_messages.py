"""The message reader: streams that are cut, broken, or too large."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimig.qmp.messages import MAX_DEPTH, Malformed, MessageReader, encode

LIMIT = 256

#: A stream and its contents: messages, or the beginning of an error text.
STREAMS: dict[str, tuple[bytes, list[Any]]] = {
    "one with CR LF": (b'{"execute":"stop"}\r\n', [{"execute": "stop"}]),
    "one without an end of line": (b'{"execute":"stop"}', [{"execute": "stop"}]),
    "three in a packet": (b'{"a":1}{"b":2} \t\n\n{"c":3}', [{"a": 1}, {"b": 2}, {"c": 3}]),
    "over several lines": (b'{\n "a":\r\n [1,\n2]\n}\n', [{"a": [1, 2]}]),
    "brackets and quotes in strings": (
        rb'{"a":"}{][\"\\"} {"\\\"}":"\u007d\n"}',
        [{"a": '}{]["\\'}, {'\\"}': "}\n"}],
    ),
    "an array": (b"[1,[2]]\n", [[1, [2]]]),
    "scalars, a line each": (b'5\n"x"\nnull\n-1.5e3\n', [5, "x", None, -1500.0]),
    "characters beyond ASCII": ('{"ä":"€𝄞"}'.encode(), [{"ä": "€𝄞"}]),
    "an escaped surrogate pair": (rb'{"a":"\ud834\udd1e"}', [{"a": "𝄞"}]),
    "half a surrogate pair": (rb'{"a":"\ud834"}{"b":1}', ["JSON parse error, half of a surrogate", {"b": 1}]),
    "garbage, then a good line": (b'hello world\n{"a":1}\n', ["JSON parse error, Expecting value", {"a": 1}]),
    "bad inside brackets, good behind": (b'{a:1}{"b":2}', ["JSON parse error, Expecting property", {"b": 2}]),
    "a control character in a string": (b'{"a":"x\x01y"} "{[\n{"b":2}\n', ["JSON parse error, a control", {"b": 2}]),
    "a line feed in a string": (b'{"a":"x\n{"b":2}\n', ["JSON parse error, a control", {"b": 2}]),
    "a stray bracket": (b'} {"a":1}\n{"b":2}\n', ["JSON parse error, stray '}'", {"b": 2}]),
    "brackets of two kinds": (b'{"a":[1}}\n{"b":2}', ["JSON parse error, Expecting ','", {"b": 2}]),
    "NaN": (b'{"a":NaN}{"b":2}', ["JSON parse error, NaN is not JSON", {"b": 2}]),
    "Infinity": (b'{"a":[-Infinity]}\n', ["JSON parse error, -Infinity is not JSON"]),
    "a number that is too large": (b'{"id":1e999}\n', ["JSON parse error, the number 1e999 is too large"]),
    "a name twice": (b'{"id":1,"id":2}\n', ["JSON parse error, duplicate key"]),
    "bad UTF-8": (b'{"a":"\xff"}{"b":2}', ["JSON parse error, not UTF-8 at byte 6", {"b": 2}]),
    "more digits than Python converts": (b"1" * 5000 + b'\n{"b":2}', ["JSON parse error", {"b": 2}]),
    "as deep as allowed": (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, [json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)]),
    "deeper than allowed": (
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b'\n{"b":2}',
        [f"JSON parse error, more than {MAX_DEPTH} levels", {"b": 2}],
    ),
    "half a message": (b'{"a":{"b":1}', []),
    "nothing but space": (b" \r\n\t\n", []),
}


def read(reader: MessageReader, *chunks: bytes) -> list[Any]:
    found: list[Any] = []
    for chunk in chunks:
        reader.feed(chunk)
        while (message := reader.next_message()) is not None:
            found.append(message.desc if isinstance(message, Malformed) else message[0])
    return found


def agree(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected), found
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, str) and isinstance(other, str):
            assert one.startswith(other)
        else:
            assert one == other


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS)
def test_a_stream_split_anywhere_holds_the_same_messages(stream: bytes, expected: list[Any]) -> None:
    agree(read(MessageReader(), stream), expected)
    agree(read(MessageReader(), *(stream[i : i + 1] for i in range(len(stream)))), expected)
    for cut in range(0, len(stream), max(1, len(stream) // 200)):
        agree(read(MessageReader(), stream[:cut], stream[cut:]), expected)


@pytest.mark.parametrize("cut", [1, 7, LIMIT, LIMIT + 1, 10 * LIMIT])
@pytest.mark.parametrize("end", [b'"', b'"}\n', b'"}\n{"a":1}'])
def test_more_than_the_limit_is_fatal_whole_or_in_pieces(cut: int, end: bytes) -> None:
    stream = b'{"a":"' + b"x" * LIMIT + end
    reader = MessageReader(max_message=LIMIT)
    found: Malformed | tuple[Any] | None = None
    for at in range(0, len(stream), cut):
        reader.feed(stream[at : at + cut])
        if (found := reader.next_message()) is not None:
            break
    assert isinstance(found, Malformed)
    assert found.fatal
    assert found.desc == f"a message of more than {LIMIT} bytes"
    assert reader.held == 0


def test_a_message_of_exactly_the_limit_is_read() -> None:
    text = b'{"a":"' + b"x" * (LIMIT - 8) + b'"}'
    assert len(text) == LIMIT
    assert read(MessageReader(max_message=LIMIT), text + text) == [json.loads(text)] * 2


def test_many_small_messages_are_more_than_the_limit_together() -> None:
    assert read(MessageReader(max_message=LIMIT), b"{}\n" * LIMIT) == [{}] * LIMIT


@pytest.mark.parametrize(("data", "partial"), [(b"", False), (b"\r\n ", False), (b'{"a"', True), (b'{"a":1}', False)])
def test_partial_tells_of_a_message_that_has_begun(data: bytes, partial: bool) -> None:
    reader = MessageReader()
    read(reader, data)
    assert reader.partial is partial


_HOSTILE = st.lists(
    st.one_of(
        st.binary(max_size=64),
        st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b":", b",", b'{"a":1}', b"\xff", b"[" * 70]),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(_HOSTILE)
def test_arbitrary_bytes_never_raise_and_never_hold_more_than_the_limit(chunks: list[bytes]) -> None:
    reader = MessageReader(max_message=LIMIT)
    for chunk in chunks:
        reader.feed(chunk)
        while (message := reader.next_message()) is not None:
            if not isinstance(message, Malformed):
                assert len(message) == 1
        assert reader.held <= LIMIT


@settings(max_examples=200, deadline=None)
@given(_HOSTILE)
def test_where_the_bytes_are_cut_decides_nothing(chunks: list[bytes]) -> None:
    whole = read(MessageReader(), b"".join(chunks))
    assert read(MessageReader(), *chunks) == whole


@settings(max_examples=200, deadline=None)
@given(_HOSTILE)
def test_a_good_line_after_anything_and_a_fresh_line_is_read(chunks: list[bytes]) -> None:
    """Only if the bytes before are not the beginning of a message that continues on the next line."""
    reader = MessageReader()
    found = read(reader, b"".join(chunks), b"\n")
    closed = any(isinstance(one, str) and "is closed" in one for one in found)
    if not reader.partial and not closed:
        assert read(reader, b'{"execute":"stop"}\n') == [{"execute": "stop"}]


COMMAND = b'{"execute":"qmp_capabilities"}{"execute":"migrate","arguments":{"uri":"exec:id"}}'
REQUESTS = {
    "POST": b"POST / HTTP/1.1\r\nHost: 127.0.0.1:4444\r\nContent-Type: text/plain\r\n\r\n" + COMMAND,
    "GET": b"GET /?" + COMMAND + b" HTTP/1.1\r\n\r\n",
    "PUT": b"PUT /x HTTP/1.1\r\n\r\n" + COMMAND,
    "OPTIONS": b"OPTIONS * HTTP/1.1\r\n\r\n" + COMMAND,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + COMMAND,
    "CONNECT": b"CONNECT localhost:80 HTTP/1.1\r\n\r\n" + COMMAND,
    "through a proxy": b"GET http://localhost/ HTTP/1.0\r\n\r\n" + COMMAND,
    "a method of its own": b"x-y /{} HTTP/1.1\r\n\r\n" + COMMAND,
    "two blanks": b"POST  / HTTP/1.1\r\n\r\n" + COMMAND,
    "empty lines first": b"\r\n\r\nPOST / HTTP/1.1\r\n\r\n" + COMMAND,
    "HTTP/0.9": b"GET /\r\n" + COMMAND,
    "TLS": b"\x16\x03\x01\x02\x00\x01\n" + COMMAND,
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_what_begins_like_another_protocol_is_the_end_however_it_is_cut(request_: bytes) -> None:
    """One fatal error and no message, in one piece, byte by byte, and cut at every place."""
    pieces = [(request_,), tuple(request_[at : at + 1] for at in range(len(request_)))]
    pieces += [(request_[:at], request_[at:]) for at in range(1, len(request_))]
    for chunks in pieces:
        reader = MessageReader()
        (desc,) = read(reader, *chunks)
        assert desc.startswith(("this is HTTP", "this is TLS"))
        assert read(reader, b"\n", COMMAND) == []
        assert (reader.partial, reader.held) == (False, 0)


def test_a_request_in_the_middle_ends_it_too() -> None:
    assert read(MessageReader(), b'{"a":1}\nPOST / HTTP/1.1\r\n\r\n' + COMMAND)[0] == {"a": 1}
    assert len(read(MessageReader(), b'{"a":1}\nPOST / HTTP/1.1\r\n\r\n' + COMMAND)) == 2


@pytest.mark.parametrize("text", ["POST", "GET /", "POST / HTTP/1.1"])
def test_a_string_that_says_http_is_a_string(text: str) -> None:
    assert read(MessageReader(), encode({"id": text}), encode(text)) == [{"id": text}, text]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_VALUES, max_size=4), st.integers(min_value=1, max_value=50))
def test_any_json_values_come_back_as_they_went(values: list[Any], size: int) -> None:
    stream = b"".join(encode(value) for value in values)
    assert read(MessageReader(), *(stream[at : at + size] for at in range(0, len(stream), size))) == values
