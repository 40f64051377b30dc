"""Tails of streams: found, split, joined again to equal bytes, fed byte by byte, and damaged."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimig.errors import LocalProtocolError, RemoteProtocolError
from trimig.guest import DeviceSection
from trimig.wire.devices.description import Limits, build, parse
from trimig.wire.devices.sections import Undelimited, join_sections, split_tail
from trimig.wire.devices.tail import Location, TailBuffer

# The stream of a machine without devices (stream.md part 12), from its first FULL section on.
NONE_JSON = (
    b'{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, '
    b'"fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8}, {"name": "unused", "type": '
    b'"unused_buffer", "size": 8}, {"name": "cpu_clock_offset", "type": "int64", "size": 8}]}, {"name": '
    b'"globalstate", "instance_id": 0, "vmsd_name": "globalstate", "version": 1, "fields": [{"name": "size", '
    b'"type": "uint32", "size": 4}, {"name": "runstate", "type": "buffer", "size": 100}]}]}'
)
NONE_TAIL = (
    bytes.fromhex("04 00000000 05 74696d6572 00000000 00000002")
    + bytes(24)
    + bytes.fromhex("7e 00000000 04 00000004 0b 676c6f62616c7374617465 00000000 00000001 0000000a 7072656c61756e6368")
    + bytes(91)
    + bytes.fromhex("7e 00000004 00 06 000001e6")
    + NONE_JSON
)
PING_7 = bytes.fromhex("08 0002 0004 00000007")


def described(name: str, size: int, instance: int = 0) -> dict[str, Any]:
    fields = [{"name": "data", "type": "buffer", "size": size}]
    return {"name": name, "instance_id": instance, "vmsd_name": name, "version": 1, "fields": fields}


def section(name: str, payload: bytes, number: int, instance: int = 0, claims: int | None = None) -> DeviceSection:
    """A section whose description says it has *claims* bytes, the truth by default."""
    return DeviceSection(
        idstr=name,
        instance_id=instance,
        version_id=1,
        payload=payload,
        section_id=number,
        description=described(name, len(payload) if claims is None else claims, instance),
    )


def ending(sections: list[DeviceSection]) -> bytes:
    text = build(4096, [s.description for s in sections if s.description is not None])
    return b"\0\x06" + struct.pack(">I", len(text)) + text


def tail_of(sections: list[DeviceSection], *, footers: bool = True) -> bytes:
    return join_sections(sections, footers=footers) + ending(sections)


def next_header(number: int, name: bytes) -> bytes:
    return b"\x04" + struct.pack(">I", number) + bytes([len(name)]) + name + bytes(8)


#: Payloads that look like what surrounds them: footers of their own and of others, headers, ends.
NASTY = [
    section("plain", b"abc", 1),
    section("footers", bytes.fromhex("7e00000002 7e00000003 7e"), 2),
    section("header", bytes.fromhex("7e00000003") + next_header(9, b"absent") + b"\x7e", 3),
    section("0000:00:01.1/ide", bytes.fromhex("7e0000000400"), 4),
    section("twin", b"\x00\x06\x00\x00\x00\x02{}", 5, 0),
    section("twin", b"", 6, 1),
    section("last", bytes.fromhex("7e00000007 080002000400000007"), 7),
]


def test_documented_stream_is_split_and_joined_again() -> None:
    """Q1, Q2: the two sections of a machine without devices."""
    split = split_tail(NONE_TAIL, offset=0x49)
    assert [(s.section_id, s.idstr, s.instance_id, s.version_id, len(s.payload)) for s in split.sections] == [
        (0, "timer", 0, 2, 24),
        (4, "globalstate", 0, 1, 104),
    ]
    assert [s.description for s in split.sections] == list(parse(NONE_JSON).devices)
    assert (split.commands, split.problems, split.description_text) == ((), (), NONE_JSON)
    assert split.eof_offset == 0xFF - 0x49
    assert join_sections(split.sections) == NONE_TAIL[: split.eof_offset]


@pytest.mark.parametrize("footers", [True, False])
def test_payloads_full_of_footers_and_headers_are_split_by_their_description(footers: bool) -> None:
    tail = tail_of(NASTY, footers=footers)
    split = split_tail(tail, footers=footers)
    assert list(split.sections) == NASTY
    assert split.problems == ()
    assert join_sections(split.sections, footers=footers) + ending(NASTY) == tail


def test_commands_between_sections_are_reported_with_their_place() -> None:
    first, rest = join_sections(NASTY[:2]), join_sections(NASTY[2:])
    unknown = bytes.fromhex("08 00ff 0003 7e0000")
    split = split_tail(first + unknown + rest + PING_7 + ending(NASTY), offset=1000)
    assert list(split.sections) == NASTY
    assert split.commands == (
        (255, b"\x7e\0\0", 1000 + len(first)),
        (2, b"\0\0\0\x07", 1000 + len(first + unknown + rest)),
    )


@pytest.mark.parametrize("wrong", [0, 3, 4, 10**9])
def test_section_with_a_wrong_size_is_delimited_by_its_footer_and_reported(wrong: int) -> None:
    sections = [NASTY[0], section("odd", b"\x7e\0\0\0\x02\x09" + b"12345", 2, claims=wrong), NASTY[2], NASTY[3]]
    split = split_tail(tail_of(sections))
    assert list(split.sections) == sections
    assert len(split.problems) == 1
    assert split.problems[0].startswith("section 'odd' was delimited by looking for its footer: ")


def test_footer_followed_by_a_header_of_no_device_is_not_believed() -> None:
    """Where there is a description, what follows a footer must be in it."""
    fake = bytes.fromhex("7e00000002") + next_header(9, b"absent")
    sections = [section("odd", fake + b"rest", 2, claims=1), NASTY[3]]
    assert list(split_tail(tail_of(sections)).sections) == sections


def test_footer_before_a_command_or_the_end_is_found() -> None:
    sections = [section("odd", b"1234", 2, claims=1), section("end", b"56", 3, claims=1)]
    body = join_sections(sections[:1]) + PING_7 + join_sections(sections[1:])
    split = split_tail(body + ending(sections))
    assert list(split.sections) == sections
    assert len(split.commands) == 1
    assert len(split.problems) == 2


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        (b"\0", "no description"),
        (ending(NASTY)[:-1], "cut short"),
        (ending(NASTY)[: 6 + 13], "cut short"),
        (ending(NASTY)[:9], "cut short"),
        (ending(NASTY)[:3], "no description"),
        (b'\0\x06\0\0\0\x11{"page_size": 42}', "no list of devices"),
    ],
)
def test_without_a_usable_description_footers_are_enough(end: bytes, problem: str) -> None:
    sections = [dataclasses.replace(s, description=None) for s in (NASTY[0], NASTY[1], NASTY[3], NASTY[5])]
    split = split_tail(join_sections(sections) + end)
    assert list(split.sections) == sections
    assert problem in split.problems[0]
    assert len(split.problems) == 1 + len(sections)


def test_what_follows_the_description_and_what_is_missing_is_reported() -> None:
    split = split_tail(join_sections(NASTY[:2]) + ending(NASTY[:3]) + b"junk")
    assert len(split.sections) == 2
    assert split.problems == (
        "4 bytes follow the description of the devices",
        "section 'header' (0) is described, but not in the stream",
    )


@pytest.mark.parametrize(
    ("tail", "offset", "name"),
    [
        (tail_of([section("a", b"12", 1, claims=1)]).replace(b"\x7e", b"\x7f"), 50, "a"),
        (join_sections([NASTY[0]])[:-1], 50, "plain"),
        (join_sections([NASTY[0]], footers=True) + b"\x09", 50, "plain"),
        (b"", 50, None),
        (b"\x09" + ending([]), 50, None),
        (b"\x04\0\0\0\x01\0" + ending([]), 50, None),
        (b"\x04\0\0\0\x01\x02\xff\xff" + bytes(8) + ending([]), 50, None),
        (b"\0\x07" + ending([]), 50, None),
    ],
    ids=["no footer", "cut", "nothing legal behind", "empty", "type", "no name", "no text", "end too early"],
)
def test_tail_that_cannot_be_split_is_refused_with_its_place(tail: bytes, offset: int, name: str | None) -> None:
    with pytest.raises(Undelimited) as caught:
        split_tail(tail, offset=offset)
    assert caught.value.section == name
    assert caught.value.offset is not None
    assert caught.value.offset >= offset


def test_without_footers_and_size_nothing_can_be_found() -> None:
    sections = [section("odd", b"1234", 2, claims=5000)]
    with pytest.raises(Undelimited, match="no footers") as caught:
        split_tail(tail_of(sections, footers=False), footers=False, offset=7)
    assert (caught.value.offset, caught.value.section) == (7, "odd")


def test_command_that_is_cut_is_refused() -> None:
    for cut in (1, 4, 8):
        with pytest.raises(RemoteProtocolError, match="cut short"):
            split_tail(PING_7[:cut])


def test_endless_list_of_commands_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="65536"):
        split_tail(bytes.fromhex("08 0001 0000") * 65_600 + ending([]))


def filled(tail: bytes) -> TailBuffer:
    buffer = TailBuffer()
    buffer.feed(tail)
    return buffer


def test_description_is_found_behind_what_looks_like_one() -> None:
    fake = section("fake", ending([])[:-1], 1)
    tail = tail_of([fake, NASTY[0]])
    found = filled(tail).location
    text = tail.rindex(b'{"page_size"')
    assert found == Location(eof_offset=text - 6, text_offset=text, text_length=len(tail) - text, complete=True)
    assert split_tail(tail).sections[0] == fake


@pytest.mark.parametrize(
    "tail", [b"", b'{"page_size"', b'\0\x06\0\0\0\x05{"page_size": 1}', b'\0\x07\0\0\0\x12{"page_size": 1}']
)
def test_text_without_a_fitting_header_is_no_description(tail: bytes) -> None:
    assert filled(tail).location is None


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"section_id": None}, "no section id"),
        ({"section_id": 2**32}, "'plain'"),
        ({"instance_id": -1}, "'plain'"),
        ({"idstr": ""}, "1 to 255"),
        ({"idstr": "x" * 256}, "1 to 255"),
    ],
)
def test_section_that_cannot_be_written_is_refused(bad: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        join_sections([dataclasses.replace(NASTY[0], **bad)])


# TailBuffer


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("tail", [NONE_TAIL, tail_of(NASTY)], ids=["machine none", "nasty"])
def test_buffer_is_complete_with_the_last_byte_and_not_before(tail: bytes, step: int) -> None:
    buffer = TailBuffer()
    for start in range(0, len(tail), step):
        assert not buffer.complete
        buffer.feed(memoryview(tail)[start : start + step])
    assert buffer.complete
    assert (bytes(buffer.finish()), buffer.excess, len(buffer)) == (tail, 0, len(tail))


@pytest.mark.parametrize("step", [1, 5, 10_000])
def test_bytes_behind_the_description_are_counted_and_not_kept(step: int) -> None:
    buffer = TailBuffer()
    data = NONE_TAIL + b"junk"
    for start in range(0, len(data), step):
        buffer.feed(data[start : start + step])
    assert (buffer.complete, bytes(buffer.finish()), buffer.excess) == (True, NONE_TAIL, 4)


@pytest.mark.parametrize("step", [1, 13, 10_000])
@pytest.mark.parametrize(
    "fake",
    [
        ending([])[:-1] + b"x",
        b'\0\x06\0\0\0\x11{"page_size": 42}',
        b'\0\x06\0\0\x10\0{"page_size"',
        b'\0\x06\xff\xff\xff\xff{"page_size"',
        b'\0\x06\0\0\0\x0c{"page_size"',
        b'{"page_size"' * 3,
    ],
    ids=["no JSON", "no description", "long", "too long", "short", "text alone"],
)
def test_device_state_that_looks_like_a_description_is_passed_over(fake: bytes, step: int) -> None:
    tail = tail_of([section("fake", fake, 1), *NASTY])
    buffer = TailBuffer()
    for start in range(0, len(tail), step):
        assert not buffer.complete
        buffer.feed(tail[start : start + step])
    assert buffer.complete
    assert buffer.finish() == tail
    assert len(split_tail(buffer.finish()).sections) == 1 + len(NASTY)


def test_buffer_has_an_upper_limit() -> None:
    buffer = TailBuffer(max_bytes=10)
    buffer.feed(b"x" * 10)
    with pytest.raises(RemoteProtocolError, match="after 10 bytes"):
        buffer.feed(b"x")


def test_description_above_its_limit_is_refused_at_once() -> None:
    buffer = TailBuffer(limits=Limits(max_bytes=100))
    with pytest.raises(RemoteProtocolError, match="a description of the devices of 486 bytes, at most 100"):
        buffer.feed(NONE_TAIL[:400])


def test_ordinary_stream_asks_nothing() -> None:
    buffer = TailBuffer()
    for byte in NONE_TAIL:
        buffer.feed(bytes([byte]))
        assert buffer.prepare_ping() is None


@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_ping_at_the_end_of_all_sections_is_seen_once_it_is_whole(step: int) -> None:
    """design.md part 5: the sender waits there for the answer, and sends the end only after it."""
    body = join_sections(NASTY) + PING_7
    buffer = TailBuffer()
    seen = []
    for start in range(0, len(body), step):
        buffer.feed(body[start : start + step])
        if (number := buffer.prepare_ping()) is not None:
            seen.append((len(buffer), number))
    # Fed in small pieces, the payload of "last" looks like it once before: a footer of its own and a PING.
    assert seen[-1] == (len(body), 7)
    buffer.feed(ending(NASTY))
    assert buffer.complete
    assert buffer.prepare_ping() is None
    assert [number for number, _, _ in split_tail(buffer.finish()).commands] == [2]


@pytest.mark.parametrize(
    "end",
    [
        PING_7[:-1],
        PING_7 + b"\0",
        bytes.fromhex("08 0001 0000"),
        bytes.fromhex("08 0002 0003 000007"),
        b"\0" + PING_7,
        PING_7 + PING_7,
        bytes.fromhex("7e 00000063") + PING_7,
    ],
    ids=["cut", "not last", "another command", "another length", "no footer", "twice", "footer of no device"],
)
def test_anything_else_at_the_end_is_no_question(end: bytes) -> None:
    buffer = TailBuffer()
    buffer.feed(join_sections(NASTY) + end)
    assert buffer.prepare_ping() is None


def test_ping_needs_no_footer_where_there_are_none() -> None:
    buffer = TailBuffer(footers=False)
    assert buffer.prepare_ping() is None
    buffer.feed(join_sections(NASTY, footers=False) + PING_7)
    assert buffer.prepare_ping() == 7


# Round trips and arbitrary input

_names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=20)


@given(
    bodies=st.lists(st.tuples(_names, st.binary(max_size=40)), max_size=6),
    footers=st.booleans(),
    step=st.integers(1, 50),
)
def test_any_sections_survive_joining_buffering_and_splitting(
    bodies: list[tuple[str, bytes]], footers: bool, step: int
) -> None:
    sections = [section(name, payload, k, instance=k) for k, (name, payload) in enumerate(bodies)]
    tail = tail_of(sections, footers=footers)
    buffer = TailBuffer(footers=footers)
    for start in range(0, len(tail), step):
        buffer.feed(tail[start : start + step])
    split = split_tail(buffer.finish(), footers=footers)
    assert list(split.sections) == sections
    assert split.problems == ()


@given(data=st.data(), footers=st.booleans())
def test_damaged_tail_is_split_or_refused_with_one_typed_error(data: st.DataObject, footers: bool) -> None:
    tail = bytearray(tail_of(NASTY, footers=footers))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(tail) - 1))
        tail[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        split = split_tail(tail, footers=footers)
    except RemoteProtocolError:
        return
    assert split.eof_offset < len(tail)
    if not split.commands:
        assert join_sections(split.sections, footers=footers) == tail[: split.eof_offset]
