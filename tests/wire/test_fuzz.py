"""Any bytes at all: events or one typed error, the same whatever the pieces, in bounded memory, and dead after it."""

from __future__ import annotations

import random
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.wire.cases import CASES, END_WORD, OPENING, START, START_HEAD, Read, encode, flat, read
from trimig.errors import RemoteProtocolError, TransportFailed
from trimig.wire import events, return_path

_STREAMS = [case.before + case.data for case in CASES]
#: Long runs of pages say little for their bytes; these are quick.
SHORT = [data for data in _STREAMS if len(data) < 14_000]
#: Bytes that mean something somewhere, to get further than random ones would.
TELLING = [b"\0", b"\1", b"\2", b"\3", b"\4", b"\5", b"\6", b"\7", b"\x08", b"\x7e", b"\xff", b"\x10", b"\x22", b"\x28"]

SETTINGS = hypothesis.settings(max_examples=150, derandomize=True)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real stream with a few bytes changed, put in, left out, repeated, or cut off."""
    data = bytearray(draw(st.sampled_from(SHORT)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        some = draw(st.one_of(st.sampled_from(TELLING), st.binary(min_size=1, max_size=9)))
        match draw(st.integers(0, 5)):
            case 0 | 1:
                data[at : at + len(some)] = some
            case 2:
                data[at:at] = some
            case 3:
                del data[at : at + len(some)]
            case 4:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case 5:
                del data[at:]
    return bytes(data)


def outcome(got: Read) -> tuple[object, ...]:
    """What must not depend on the pieces. How much of a wrong magic is quoted may."""
    text = str(got.error)
    return (flat(got.found), type(got.error), text[:23] if text.startswith("not a migration stream") else text)


def check(data: bytes, seed: int, **options: Any) -> None:
    """All that holds for any bytes."""
    whole = read(data, **options)
    if whole.error is not None:
        assert isinstance(whole.error, RemoteProtocolError | TransportFailed)
        if isinstance(whole.error, RemoteProtocolError):
            assert whole.error.offset is not None
            assert 0 <= whole.error.offset <= len(data)
        with pytest.raises(type(whole.error)) as caught:
            whole.decoder.next_event()
        assert caught.value is whole.error
    chance = random.Random(seed)
    pieces = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, 12)))
    assert outcome(read(data, pieces=pieces, **options)) == outcome(whole), pieces
    small = read(data, step=chance.choice([1, 2, 61]), buffer_bytes=1, **options)
    assert outcome(small) == outcome(whole)
    assert len(small.decoder.writable()) <= 16384 + 4 * len(data)
    if whole.error is None:
        kept = sum(len(e.text) for e in whole.found if isinstance(e, events.DescriptionElement))
        assert kept <= len(data)


@SETTINGS
@hypothesis.given(data=st.binary(max_size=300), seed=st.integers(0, 2**16))
def test_arbitrary_bytes(data: bytes, seed: int) -> None:
    """T4."""
    check(data, seed)


@SETTINGS
@hypothesis.given(data=st.binary(max_size=300), seed=st.integers(0, 2**16), start=st.integers(0, 3))
def test_arbitrary_bytes_behind_a_good_beginning(data: bytes, seed: int, start: int) -> None:
    """T4: where an element, a size list, a RAM record or a description would stand."""
    prefix = [OPENING, OPENING + START_HEAD, OPENING + START + b"\2\0\0\0\2", OPENING + b"\0"][start]
    check(prefix + data, seed)


@hypothesis.settings(max_examples=300, derandomize=True)
@hypothesis.given(data=mutated(), seed=st.integers(0, 2**16))
def test_mutated_streams(data: bytes, seed: int) -> None:
    """T4: real streams with a few bytes changed get further than random bytes."""
    check(data, seed)


@SETTINGS
@hypothesis.given(data=mutated(), seed=st.integers(0, 2**16))
def test_mutated_streams_of_unknown_devices(data: bytes, seed: int) -> None:
    check(data, seed, measure=None)


@SETTINGS
@hypothesis.given(data=mutated(), seed=st.integers(0, 2**16))
def test_mutated_streams_of_an_old_peer(data: bytes, seed: int) -> None:
    check(data, seed, configuration=False, footers=False, description=False)


@SETTINGS
@hypothesis.given(data=mutated())
def test_what_was_read_of_a_mutated_stream_is_written_again(data: bytes) -> None:
    """Q1: byte by byte, except for offsets in end words, which mean nothing."""
    found = read(data, eof=False)
    used = found.decoder.offset
    match found.found[-1:]:
        case [events.DescriptionElement(at=at, text=text)]:
            used = at + 5 + len(text)
        case [events.EndOfStream(at=at)]:
            used = at + 1
    expected = bytearray(data[:used])
    for event in found.found:
        if isinstance(event, events.RamEnd):
            expected[event.at : event.at + 8] = END_WORD
    assert encode(found.found) == expected


#: A name for each type, and lengths that are right, in any order.
_BLOCKS = {"pc.ram": 0x100000, "rom": 0x8000}
_MESSAGES = [
    "0001 0004 00000000",
    "0001 0004 00000001",
    "0002 0004 00000001",
    "0003 0013 00000000000da000 00001000 06 70632e72616d",
    "0004 000c 00000000000e4000 00001000",
    "0006 0004 00000001",
]


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Messages of the return path, some of them damaged."""
    parts = draw(st.lists(st.sampled_from([bytes.fromhex(m) for m in _MESSAGES]), max_size=6))
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


@SETTINGS
@hypothesis.given(data=st.one_of(answers(), st.binary(max_size=100)), step=st.integers(1, 30))
def test_return_path_of_any_bytes(data: bytes, step: int) -> None:
    """K3, K7, T4: messages or one typed error, the same in any pieces; never more than a message is kept."""

    def run(step: int) -> tuple[list[return_path.Message], str | None]:
        decoder = return_path.ReturnPathDecoder(_BLOCKS)
        found: list[return_path.Message] = []
        for at in range(0, len(data), step):
            try:
                found += decoder.feed(data[at : at + step])
            except RemoteProtocolError as error:
                return found, str(error)
            assert decoder.pending < 4 + return_path.MAX_PAYLOAD
        return found, None

    bytewise = run(1)
    assert run(step)[1] == bytewise[1]
    if bytewise[1] is None:
        assert run(step)[0] == bytewise[0]
        written = b"".join(map(return_path.encode, bytewise[0]))
        assert data.startswith(written)
