"""Websocket frames: headers at every split, broken rules, masks from every start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.transport._frames import (
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

KEY = b"\x37\xfa\x21\x3d"

#: The examples of RFC 6455 part 5.7, and each border of the length.
FRAMES = [
    (Header(opcode=Opcode.TEXT, final=True, length=5), "8105"),
    (Header(opcode=Opcode.TEXT, final=True, length=5, key=KEY), "818537fa213d"),
    (Header(opcode=Opcode.TEXT, final=False, length=3), "0103"),
    (Header(opcode=Opcode.CONTINUATION, final=True, length=2), "8002"),
    (Header(opcode=Opcode.PING, final=True, length=5), "8905"),
    (Header(opcode=Opcode.BINARY, final=True, length=125), "827d"),
    (Header(opcode=Opcode.BINARY, final=True, length=126), "827e007e"),
    (Header(opcode=Opcode.BINARY, final=True, length=256), "827e0100"),
    (Header(opcode=Opcode.BINARY, final=True, length=65535), "827effff"),
    (Header(opcode=Opcode.BINARY, final=True, length=65536), "827f0000000000010000"),
    (Header(opcode=Opcode.BINARY, final=True, length=65536, key=KEY), "82ff000000000001000037fa213d"),
]


@pytest.mark.parametrize(("header", "digits"), FRAMES)
def test_header_is_written_and_read_at_every_split(header: Header, digits: str) -> None:
    data = bytes.fromhex(digits)
    assert header.encode() == data
    client = bool(header.key)
    assert read_header(memoryview(data + b"rest"), from_client=client) == (header, len(data))
    for cut in range(len(data)):
        assert read_header(memoryview(data[:cut]), from_client=client) is None


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("c200", "extension that was not agreed"),
        ("8300", "unknown kind 3"),
        ("8b00", "unknown kind 11"),
        ("8280", "a server sent a frame with a mask"),
        ("827e007d", "shortest form"),
        ("827f000000000000ffff", "shortest form"),
        ("827f8000000000000000", "shortest form"),
        ("0900", "control frame is too long or in pieces"),
        ("897e0080", "control frame is too long or in pieces"),
    ],
)
def test_bad_header_is_named(digits: str, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        read_header(memoryview(bytes.fromhex(digits)), from_client=False)


@given(st.binary(max_size=100), st.binary(min_size=4, max_size=4), st.integers(0, 9), st.integers(0, 7))
def test_mask_is_that_of_the_rfc_wherever_it_begins(data: bytes, key: bytes, place: int, offset: int) -> None:
    buffer = bytearray(bytes(offset) + data)
    mask(memoryview(buffer)[offset:], key, place)
    assert buffer[offset:] == bytes(byte ^ key[(place + i) % 4] for i, byte in enumerate(data))


@given(data=st.binary(max_size=100), key=st.binary(min_size=4, max_size=4), offset=st.integers(0, 7))
def test_mask_into_another_place(data: bytes, key: bytes, offset: int) -> None:
    source, target = bytearray(bytes(offset) + data), bytearray(len(data))
    mask_into(memoryview(target), memoryview(source)[offset:], key)
    assert target == bytes(byte ^ key[i % 4] for i, byte in enumerate(data))
    assert source[offset:] == data


def test_close_has_a_code_and_a_reason_or_neither() -> None:
    assert read_close(close_payload(1000, "bye")) == (1000, "bye")
    assert read_close(b"") == (CloseCode.NONE, "")
    assert len(close_payload(1002, "ü" * 200)) <= 125
    for bad in (b"\x03", b"\x00\x01", b"\x03\xed", b"\x03\xe8\xff"):
        with pytest.raises(FrameError):
            read_close(bad)
