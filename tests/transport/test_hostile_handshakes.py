"""Opening handshakes with any byte in any place: each ends in an answer, in one error, or in a good connection.

The functions are called directly, over memory streams, so that a thousand handshakes take a second. The tests that a
server goes on serving are in ``tests/qmp/test_hostile_connections.py`` and ``tests/engine/test_lobby.py``.
"""

from __future__ import annotations

import random
import ssl
from collections import Counter
from pathlib import Path

import pytest
import trio
from trio.testing import memory_stream_pair
from wsproto.utilities import generate_accept_token

from tests.transport.pki import Pki, secure
from trimig.errors import TransportFailed
from trimig.transport import _credentials, _tls
from trimig.transport._opening import NotUnderstood, from_a_page, welcome
from trimig.transport._websocket import open_client, open_server

REQUEST = (
    b"GET /qmp?a=b HTTP/1.1\r\nHost: example.org:4711\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: chat, qmp\r\nSec-WebSocket-Extensions: permessage-deflate; a=1\r\n"
    b"Cookie: a=b\r\nX-Other: x\r\n\r\n"
)
ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n"
    b"Server: x\r\n"
)
#: Bytes with a meaning in HTTP, and bytes that are not ASCII.
BYTES = b"\x00\t\n\r ,:;=\x7f\x80\xc3\xf0\xff"
SEED = 20


def mutations(good: bytes, random_ones: int) -> list[bytes]:
    """Each of BYTES in each place; then cuts, repetitions and random changes, the same in every run."""
    found = [good[:at] + bytes((byte,)) + good[at + 1 :] for at in range(len(good)) for byte in BYTES]
    source = random.Random(SEED)
    for _ in range(random_ones):
        data = bytearray(good)
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(data))
            match source.randrange(4):
                case 0:
                    data[at] = source.randrange(256)
                case 1:
                    del data[at : at + source.randint(1, 20)]
                case 2:
                    data[at:at] = source.randbytes(source.randint(1, 20))
                case _:
                    data[at:at] = data[at : at + source.randint(1, 40)]
            if not data:
                data += b"\0"
        found.append(bytes(data))
    return found


async def test_any_request_is_answered_or_refused() -> None:
    outcomes: Counter[str] = Counter()
    for request in mutations(REQUEST, 2000):
        client, server = memory_stream_pair()
        await client.send_all(request)
        await client.send_eof()
        try:
            await welcome(server, lambda request: (403, "a page") if from_a_page(request) else None)
        except NotUnderstood:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
        await server.send_eof()
        answer = await client.receive_some()
        # An incomplete head is no request, and gets no answer.
        if b"\r\n\r\n" in request:
            assert answer.startswith(b"HTTP/1.1 "), (request, answer)
            assert answer.split()[1] in (b"101", b"400", b"426"), (request, answer)
    assert min(outcomes["accepted"], outcomes["refused"]) > 200, outcomes


@pytest.mark.parametrize(
    "change",
    [
        (b"Host: example", b"Host: ex\xf0mple"),
        (b"Upgrade: websocket", b"Upgrade: web\xffsocket"),
        (b"Connection: keep", b"Connection: \xc3\xa9eep"),
        (b"chat, qmp", b"ch\x80t"),
        (b"permessage-deflate", b"perm\xffssage"),
        (b"Version: 13", b"Version: \xff"),
        (b"/qmp?a=b", b"/qmp\xff"),
        (b"Host: example.org:4711", b"Host: xn--\x80" + b"9" * 4000),
    ],
)
async def test_byte_beyond_ascii_is_a_bad_request(change: tuple[bytes, bytes]) -> None:
    client, server = memory_stream_pair()
    await client.send_all(REQUEST.replace(*change))
    with pytest.raises(TransportFailed, match="no request for a websocket"):
        await open_server(server, "", "here")
    assert (await client.receive_some()).split()[1] in (b"400", b"426")


async def answered(make: bytes) -> str:
    """The result of a client for that answer; ``%s`` is replaced by its key."""
    client, server = memory_stream_pair()
    result = ""

    async def ask() -> None:
        nonlocal result
        try:
            stream = await open_client(client, "example.org:1", "/", "ws://example.org:1/")
        except TransportFailed as error:
            result = str(error)
        else:
            result = "open"
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        request = bytes(await server.receive_some())
        key = request.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        await server.send_all(make.replace(b"%s", generate_accept_token(key)))
        await server.send_eof()
    return result


async def test_any_answer_is_one_error_for_a_client() -> None:
    outcomes: Counter[bool] = Counter()
    for answer in mutations(ANSWER + b"Sec-WebSocket-Extensions: a\r\nSec-WebSocket-Protocol: b\r\n\r\n", 500)[::3]:
        outcomes[await answered(answer) == "open"] += 1
    for answer in mutations(ANSWER + b"\r\n", 1000)[::3]:
        outcomes[await answered(answer) == "open"] += 1
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize(
    "line",
    [
        b"Sec-WebSocket-Accept: \xff\xf0",
        b"Sec-WebSocket-Protocol: \xff",
        b"Sec-WebSocket-Extensions: \xff",
        b"Upgrade: \xff",
        b"Connection: \xff",
    ],
)
async def test_answer_beyond_ascii_is_one_error(line: bytes) -> None:
    for status in (b"101 x", b"404 \xff"):
        lines = b"HTTP/1.1 " + status + b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + line + b"\r\n\r\n"
        assert "no websocket at ws://example.org:1/" in await answered(lines)


async def test_text_in_a_header_of_no_meaning_does_no_harm() -> None:
    assert await answered(ANSWER + b"X-Place: Z\xc3\xbcrich\r\n\r\n") == "open"


def client_hello() -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    out = ssl.MemoryBIO()
    end = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        end.do_handshake()
    return out.read()


async def test_any_bytes_fail_a_tls_handshake_and_nothing_else(tmp_path: Path) -> None:
    credentials = _credentials.load(secure(Pki(tmp_path).make("server")), "server")
    assert credentials is not None
    source = random.Random(SEED)
    inputs = [source.randbytes(source.randint(0, 300)) for _ in range(100)]
    hello = client_hello()
    for _ in range(300):
        changed = bytearray(hello)
        changed[source.randrange(len(hello))] = source.randrange(256)
        inputs.append(bytes(changed))
    for data in inputs:
        client, server = memory_stream_pair()
        await client.send_all(data)
        await client.send_eof()
        with pytest.raises(TransportFailed, match="no TLS with here"):
            await _tls.secure(server, credentials, "here")
