"""After any bytes on one connection the servers serve the next one: QMP over unix and tcp, and over a websocket."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import trio
from trio_websocket import open_websocket_url

from tests.qmp import fake
from tests.qmp.test_websocket import negotiated, still_good
from tests.qmp.test_websocket import serving as serving_websocket
from tests.transport.test_hostile_handshakes import REQUEST, SEED, mutations
from trimig.transport._frames import Header, Opcode, mask

KEY = b"\x01\x80\xff\x3d"


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """A frame as a client sends it."""
    data = bytearray(payload)
    if data:
        mask(memoryview(data), KEY)
    return Header(opcode=Opcode(opcode), final=final, length=len(data), key=KEY).encode() + data


#: Sequences of frames that break a rule, or come after the server has closed.
FRAMES = [
    frame(8, b"\x03\xe8") + frame(9, b"behind the end") + frame(1, b"{}"),
    frame(8, b""),
    frame(8, b"\x03"),
    frame(8, b"\x00\x00"),
    frame(8, b"\x03\xe8\xff\xf0"),
    frame(9, b"\xff" * 125) * 50,
    frame(10, b"\xff"),
    frame(1, b"\xff\xfe"),
    frame(1, b"\xc3", final=False) + frame(0, b"\x28"),
    frame(0, b"{}"),
    frame(1, b"{", final=False) + frame(1, b"}"),
    frame(1, b"", final=False) * 3000,
    frame(1, b"{", final=False) + frame(0, b"", final=False) * 3000 + frame(9, b"") + frame(0, b"}"),
    frame(2, b"\xc1"),
    frame(2, b"\xa9caf\xc3\xa9\xff\xff\xff\xff"),
    b"\x81\x05hello",  # without a mask
    b"\xf1\x80" + KEY,
    b"\x83\x80" + KEY,
    b"\x81\xff\x00\x00\x00\x00\xff\xff\xff\xff" + KEY,
    b"\x81\xff\x80\x00\x00\x00\x00\x00\x00\x00" + KEY,
    b"\x89\xfe\x01\x00" + KEY + bytes(256),
]


async def throw(address: str, data: bytes) -> bytes:
    """Connect, send, and read until the server closes or has answered the last message."""
    host, _, port = address.removeprefix("ws://").removeprefix("tcp:").partition("/")[0].rpartition(":")
    kind, _, rest = address.partition(":")
    stream = await trio.open_unix_socket(rest) if kind == "unix" else await trio.open_tcp_stream(host, int(port))
    answer = b""
    async with stream:
        try:
            await stream.send_all(data)
            await stream.send_eof()
            while part := await stream.receive_some():
                answer += part
        except trio.BrokenResourceError:
            pass
    return answer


async def test_control_websocket_survives_any_handshake() -> None:
    source = random.Random(SEED)
    inputs = source.sample(mutations(REQUEST.replace(b"/qmp?a=b", b"/qmp"), 300), 300)
    inputs += [source.randbytes(source.randint(0, 200)) for _ in range(50)]
    async with serving_websocket() as (_, address), open_websocket_url(address) as good:
        await good.get_message()
        await negotiated(good, packed=False)
        for data in inputs:
            answer = await throw(address, data)
            if answer:
                assert answer.startswith(b"HTTP/1.1 ")
        # This input once ended the server process.
        assert b" 400 " in await throw(address, REQUEST.replace(b"Host: ", b"Host: x\xf0").replace(b"?a=b", b""))
        await still_good(good)
        async with open_websocket_url(address) as another:
            await another.get_message()
            await negotiated(another, packed=True)


@pytest.mark.parametrize("frames", FRAMES, ids=range(len(FRAMES)))
async def test_control_websocket_survives_any_frames(frames: bytes) -> None:
    request = REQUEST.replace(b"/qmp?a=b", b"/qmp")
    async with serving_websocket() as (_, address), open_websocket_url(address) as good:
        await good.get_message()
        await negotiated(good, packed=False)
        assert (await throw(address, request + frames)).startswith(b"HTTP/1.1 101 ")
        await still_good(good)


async def test_control_websocket_survives_random_frames() -> None:
    request = REQUEST.replace(b"/qmp?a=b", b"/qmp")
    source = random.Random(SEED)
    command = frame(1, json.dumps({"execute": "qmp_capabilities"}).encode())
    async with serving_websocket() as (_, address), open_websocket_url(address) as good:
        await good.get_message()
        await negotiated(good, packed=False)
        for _ in range(300):
            data = bytearray(command * 3)
            for _ in range(source.randint(1, 5)):
                data[source.randrange(len(data))] = source.randrange(256)
            await throw(address, request + data)
        await still_good(good)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_qmp_socket_survives_any_bytes(tmp_path: Path, kind: str) -> None:
    source = random.Random(SEED)
    good = b'{"execute":"qmp_capabilities"}\r\n{"execute":"echo","arguments":{"a":[1,2.5,"\\u00e9",null]},"id":7}\r\n'
    inputs = source.sample(mutations(good, 200), 300)
    inputs += [source.randbytes(source.randint(0, 200)) for _ in range(50)]
    inputs += [
        b'{"execute":"echo","id":' + b"9" * 5000 + b"}",
        b'{"execute":"echo","id":1e999}',
        b"[" * 100_000,
        REQUEST,
    ]
    async with fake.serving(tmp_path if kind == "unix" else "tcp:127.0.0.1:0") as (_, address):
        for data in inputs:
            assert (await throw(address, data)).startswith(b'{"QMP"')
        async with fake.talking(address) as raw:
            assert await raw.ask(b'{"execute":"echo","arguments":{"a":1}}') == {"return": {"a": 1}}
