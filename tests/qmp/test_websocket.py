"""QMP over a websocket: frames of both kinds, hostile frames, and refused clients."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from tests.qmp.fake import LIMIT, Fake
from trimig.errors import ConfigError, TransportFailed
from trimig.qmp.websocket import serve_websocket

ECHO = {"execute": "echo", "arguments": {"a": 1}, "id": 7}


@asynccontextmanager
async def serving(fake: Fake | None = None) -> AsyncIterator[tuple[Fake, str]]:
    fake = fake or Fake()
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(serve_websocket, fake, "ws://127.0.0.1:0/qmp")
            yield fake, address
            nursery.cancel_scope.cancel("the test is over")


@asynccontextmanager
async def client(address: str) -> AsyncIterator[WebSocketConnection]:
    """A client after the greeting, which is text."""
    async with open_websocket_url(address) as connection:
        greeting = await connection.get_message()
        assert isinstance(greeting, str)
        assert "QMP" in json.loads(greeting)
        yield connection


async def ask(connection: WebSocketConnection, frame: str | bytes) -> tuple[type, dict[str, Any]]:
    """The answer to one frame, and the kind of the answer's frame."""
    await connection.send_message(frame)
    found = await connection.get_message()
    return type(found), msgpack.unpackb(found) if isinstance(found, bytes) else json.loads(found)


async def negotiated(connection: WebSocketConnection, *, packed: bool) -> None:
    command = {"execute": "qmp_capabilities"}
    kind, answer = await ask(connection, msgpack.packb(command) if packed else json.dumps(command))
    assert (kind, answer) == (bytes if packed else str, {"return": {}})


async def still_good(connection: WebSocketConnection) -> None:
    kind, answer = await ask(connection, json.dumps(ECHO))
    assert (kind, answer) == (str, {"return": {"a": 1}, "id": 7})


async def test_each_answer_comes_in_the_kind_of_frame_of_its_command() -> None:
    async with serving() as (_, address), client(address) as connection:
        await negotiated(connection, packed=True)
        await still_good(connection)
        kind, answer = await ask(connection, msgpack.packb(ECHO))
        assert (kind, answer) == (bytes, {"return": {"a": 1}, "id": 7})


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb(ECHO)[:-1],
        msgpack.packb(ECHO) + b"\x00",
        msgpack.packb({"execute": "echo", "arguments": {"a": math.nan}}),
        msgpack.packb({"execute": "echo", "arguments": {"a": math.inf}}),
        msgpack.packb({"execute": "echo", "arguments": {"a": b"\xff\xfe"}}),
        msgpack.packb({"execute": "echo", "arguments": {"a": msgpack.ExtType(5, b"x")}}),
        msgpack.packb({"execute": "echo", "arguments": {1: 2}}),
        b"\x82\xa7execute\xa4echo\xa7execute\xa4stop",
        b"\x82\xa7execute\xa4echo\xa9arguments\x82\xa1a\x01\xa1a\x02",
        '{"execute": "echo", "execute": "stop"}',
        '{"execute": "echo", "arguments": {"a": 1, "a": 2}}',
        msgpack.packb(5),
        msgpack.packb([1, 2]),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgpack.packb({"execute": "echo", "arguments": {"a": list(range(5000))}}),
        nested(2000),
        nested(100_000),
        "",
        "{",
        "nonsense",
        '{"execute": 5}',
        "[" * 5000,
        json.dumps(ECHO) + "{",
    ],
    ids=str,
)
async def test_hostile_frame_gets_an_error_and_the_connection_lives(frame: str | bytes) -> None:
    """QMP's own kind of error; the conversations of other clients and the server go on."""
    async with serving() as (fake, address), client(address) as other, client(address) as connection:
        await negotiated(connection, packed=False)
        await negotiated(other, packed=True)
        await connection.send_message(frame)
        while True:
            found = await connection.get_message()
            answer = msgpack.unpackb(found) if isinstance(found, bytes) else json.loads(found)
            if "error" in answer:
                break
        assert answer["error"]["class"] in ("GenericError", "CommandNotFound")
        assert answer["error"]["desc"]
        await still_good(connection)
        await still_good(other)
        assert all(name == "echo" and given.get("a") != 2 for name, given in fake.executed)
        assert all(not isinstance(value, bytes | float) for _, given in fake.executed for value in given.values())


async def status_of(address: str, path: str, *headers: str) -> int:
    """The server's answer to a handshake, without a client library: trimig's leaves its socket open after a refusal."""
    host, _, port = address.removeprefix("ws://").partition("/")[0].rpartition(":")
    lines = [
        f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers, "", "",
    ]  # fmt: skip
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all("\r\n".join(lines).encode())
        answer = b""
        while b"\r\n" not in answer:
            answer += await stream.receive_some()
    return int(answer.split()[1])


async def test_clients_that_are_let_in() -> None:
    """Pages in a browser are refused, from every site; and there is only one path."""
    async with serving() as (_, address):
        assert await status_of(address, "/qmp") == 101
        assert await status_of(address, "/qmp", "Origin: http://evil.example") == 403
        assert await status_of(address, "/qmp", "origin: null") == 403
        assert await status_of(address, "/qmp/more") == 404
        async with client(address) as connection:
            await negotiated(connection, packed=False)


async def test_events_come_in_the_kind_of_the_first_command() -> None:
    async with serving() as (fake, address), client(address) as packed, client(address) as text:
        await negotiated(packed, packed=True)
        await negotiated(text, packed=False)
        for told in fake.subscribers:
            told({"event": "STOP"})
        found = await packed.get_message()
        assert isinstance(found, bytes)
        assert msgpack.unpackb(found)["event"] == "STOP"
        assert json.loads(await text.get_message())["event"] == "STOP"


async def test_client_that_vanishes_takes_no_other_along() -> None:
    async with serving() as (fake, address), client(address) as stays:
        await negotiated(stays, packed=False)
        async with trio.open_nursery() as nursery:
            async with client(address) as goes:
                await negotiated(goes, packed=False)
                await goes.send_message(json.dumps({"execute": "wait"}))
                await fake.waiting.wait()
            fake.hold.set()
            nursery.cancel_scope.cancel("done")
        await still_good(stays)


@pytest.mark.parametrize("address", ["ws://", "tcp:127.0.0.1:1", "ws://127.0.0.1", "ws://127.0.0.1:x/", "wss://h:1/"])
async def test_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="no address to control from"):
        await serve_websocket(Fake(), address)


async def test_address_that_is_taken() -> None:
    async with serving() as (_, address):
        with pytest.raises(TransportFailed, match="cannot listen on"):
            await serve_websocket(Fake(), address)
