"""ws: and wss:, against trimig, against the independent library websockets, and against peers that break rules."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
import websockets.exceptions
import websockets.sync.client
import websockets.sync.server
from trio.testing import check_two_way_stream, lockstep_stream_pair, memory_stream_pair

import trimig
from tests.qemu import peers
from tests.transport.pki import Pki, connected, outcome, secure, try_both
from trimig import transport
from trimig.config import Config
from trimig.errors import ConfigError, TransportFailed
from trimig.transport import _websocket, _weburl
from trimig.transport._frames import CloseCode, Header, Opcode, close_payload, mask, read_close, read_header
from trimig.transport._websocket import WebSocketStream

WS = "ws://127.0.0.1:0/"
KEY = b"\x37\xfa\x21\x3d"


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pki = Pki(tmp_path_factory.mktemp("pki"))
    directory = pki.make("server")
    pki.write(directory, "client", common_name="host-a")
    return directory


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "tcp", "target"),
    [
        ("//host:1/a/b?c=d", "host:1", "/a/b?c=d"),
        ("//host", "host:80", ""),
        ("//[::1]:5", "[::1]:5", ""),
        ("//[::1]/x", "[::1]:80", "/x"),
        ("//:1/", ":1", "/"),
        ("//h:1/ü b", "h:1", "/%C3%BC%20b"),
        ("//h:1?q", "h:1", "/?q"),
    ],
)
def test_address_is_taken_apart(rest: str, tcp: str, target: str) -> None:
    address = _weburl.parse("ws", rest)
    assert (address.tcp, address.target) == (tcp, target)


@pytest.mark.parametrize(
    "rest", ["", "host:1", "/host:1", "//host:x", "//host:70000", "//u@host:1", "//host:1/#f", "//[::1", "//a..b:1/"]
)
async def test_bad_address_is_refused(rest: str) -> None:
    for scheme in ("ws", "wss"):
        with pytest.raises(ConfigError) as caught:
            await transport.connect(f"{scheme}:{rest}")
        assert caught.value.name == "uri"


async def test_ws_has_no_tls_and_a_wss_listener_needs_credentials(directory: Path) -> None:
    with pytest.raises(ConfigError, match="use wss:"):
        await transport.connect("ws://127.0.0.1:1/", secure(directory))
    with pytest.raises(ConfigError, match="set tls-creds"):
        async with transport.listening("wss://127.0.0.1:0/", lambda _: None):
            pass


# -- the stream --------------------------------------------------------------------------------------------------------

Pair = tuple[trio.abc.Stream, trio.abc.Stream]


def socket_pair() -> Pair:
    one, other = trio.socket.socketpair()
    return trio.SocketStream(one), trio.SocketStream(other)


def over(below: Callable[[], Pair], *, swap: bool) -> Callable[[], AsyncIterator[Pair]]:
    async def pair() -> Pair:
        await trio.lowlevel.checkpoint()
        near, far = below()
        ends = WebSocketStream(near, client=True), WebSocketStream(far, client=False)
        return (ends[1], ends[0]) if swap else ends

    return pair  # type: ignore[return-value]  # what trio's checks call


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("below", [memory_stream_pair, socket_pair])
async def test_it_is_a_stream_as_trio_wants_it(below: Callable[[], Pair], *, swap: bool) -> None:
    clogged = over(lockstep_stream_pair, swap=swap) if below is memory_stream_pair else None
    await check_two_way_stream(over(below, swap=swap), clogged)  # type: ignore[arg-type]  # sides with one method more


class Raw:
    """A peer that sends any frames, and reads the answers."""

    def __init__(self, *, client: bool) -> None:
        ours, theirs = memory_stream_pair()
        self.stream = WebSocketStream(ours, client=not client)
        self.wire = theirs
        self._client = client

    async def send(self, opcode: int, payload: bytes = b"", *, final: bool = True, key: bytes | None = None) -> None:
        """One frame, masked if this is a client, or as *key* says."""
        key = (KEY if self._client else b"") if key is None else key
        body = bytearray(payload)
        if key and body:
            mask(memoryview(body), key)
        head = Header(opcode=Opcode(opcode), final=final, length=len(payload), key=key).encode()
        await self.wire.send_all(head + body)

    async def frame(self) -> tuple[Opcode, bytes]:
        """The next frame of the stream under test."""
        data = bytearray()
        while (found := read_header(memoryview(data), from_client=not self._client)) is None:
            data += await self._byte()
        header, _ = found
        body = bytearray()
        while len(body) < header.length:
            body += await self._byte()
        if header.key and body:
            mask(memoryview(body), header.key)
        return header.opcode, bytes(body)

    async def _byte(self) -> bytes:
        data = await self.wire.receive_some(1)
        assert data
        return bytes(data)


@pytest.mark.parametrize("client", [True, False])
async def test_fragments_pings_and_empty_frames_are_no_part_of_the_stream(*, client: bool) -> None:
    raw = Raw(client=client)
    await raw.send(Opcode.BINARY, b"abc", final=False)
    await raw.send(Opcode.PING, b"are you there?")
    await raw.send(Opcode.CONTINUATION, b"", final=False)
    await raw.send(Opcode.CONTINUATION, b"def")
    await raw.send(Opcode.PONG, b"unasked")
    await raw.send(Opcode.BINARY, b"")
    await raw.send(Opcode.BINARY, b"ghi")
    got = b""
    while len(got) < 9:
        got += await raw.stream.receive_some(5)
    assert got == b"abcdefghi"
    await raw.send(Opcode.BINARY, b"!")
    assert await raw.stream.receive_some() == b"!"  # before it waits, it answers
    assert await raw.frame() == (Opcode.PONG, b"are you there?")


async def test_ping_is_answered_by_the_sender_if_it_is_sending() -> None:
    raw = Raw(client=True)
    await raw.send(Opcode.PING, b"1")
    await raw.send(Opcode.PING, b"2")
    await raw.send(Opcode.BINARY, b"x")
    assert await raw.stream.receive_some() == b"x"
    await raw.stream.send_all(b"data")
    assert await raw.frame() == (Opcode.BINARY, b"data")
    assert await raw.frame() == (Opcode.PONG, b"2")  # the last one is enough


@pytest.mark.parametrize("client", [True, False])
async def test_long_writes_become_several_frames_and_arrive_whole(*, client: bool) -> None:
    data = np.random.default_rng(1).integers(0, 256, 3 * _websocket.FRAME_SIZE + 17, dtype=np.uint8)
    near, far = socket_pair()
    sender, receiver = WebSocketStream(near, client=client), WebSocketStream(far, client=not client)
    got = bytearray()
    chance = random.Random(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send_all, data.data)
        buffer = memoryview(bytearray(1 << 20))
        while len(got) < len(data):
            # Offsets and sizes of every kind, small ones too.
            start = chance.randrange(8)
            size = chance.choice((1, 100, 5000, 1 << 18, (1 << 20) - 8))
            count = await receiver.receive_into(buffer[start : start + size])
            got += buffer[start : start + count]
    assert got == data.tobytes()
    for end in (sender, receiver):
        await trio.aclose_forcefully(end)


@pytest.mark.parametrize(
    ("frames", "code", "words"),
    [
        ([(Opcode.TEXT, b"{}", {})], CloseCode.UNSUPPORTED, "a text message"),
        ([(Opcode.CONTINUATION, b"x", {})], CloseCode.PROTOCOL_ERROR, "belongs to no message"),
        (
            [(Opcode.BINARY, b"", {"final": False}), (Opcode.BINARY, b"x", {})],
            CloseCode.PROTOCOL_ERROR,
            "a message in another",
        ),
        ([(Opcode.BINARY, b"x", {"key": b""})], CloseCode.PROTOCOL_ERROR, "a client sent a frame without a mask"),
        ([(Opcode.CLOSE, b"\x00", {})], CloseCode.PROTOCOL_ERROR, "invalid code"),
    ],
)
async def test_peer_that_breaks_a_rule_is_told_and_refused(
    frames: list[tuple[Opcode, bytes, dict[str, object]]], code: CloseCode, words: str
) -> None:
    raw = Raw(client=True)
    for opcode, payload, how in frames:
        await raw.send(opcode, payload, **how)  # type: ignore[arg-type]  # final, key
    with pytest.raises(trio.BrokenResourceError, match=words):
        await raw.stream.receive_some()
    opcode, payload = await raw.frame()
    assert opcode is Opcode.CLOSE
    assert read_close(payload)[0] == code
    for call in (raw.stream.receive_some(), raw.stream.send_all(b"x")):
        with pytest.raises(trio.BrokenResourceError, match=words):
            await call


async def test_message_that_is_too_long_is_refused_before_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether one frame is too long, or the sum of its fragments."""
    monkeypatch.setattr(_websocket, "MAX_MESSAGE", 1000)
    for already in (0, 600):
        raw = Raw(client=True)
        if already:
            await raw.send(Opcode.BINARY, bytes(already), final=False)
            assert len(await raw.stream.receive_some()) == already
        opcode = Opcode.CONTINUATION if already else Opcode.BINARY
        await raw.wire.send_all(Header(opcode=opcode, final=True, length=1001 - already, key=KEY).encode())
        with pytest.raises(trio.BrokenResourceError, match="a message of more than 1000 bytes"):
            await raw.stream.receive_some()
        assert read_close((await raw.frame())[1])[0] == CloseCode.TOO_BIG


async def test_flood_of_empty_frames_lets_others_run() -> None:
    raw = Raw(client=True)
    await raw.wire.send_all(Header(opcode=Opcode.BINARY, final=True, length=0, key=KEY).encode() * 20_000)
    await raw.send(Opcode.BINARY, b"x")
    turns = 0
    async with trio.open_nursery() as nursery:

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(count)
        assert await raw.stream.receive_some() == b"x"
        nursery.cancel_scope.cancel()
    assert turns > 50


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", None),
        (close_payload(1000, ""), None),
        (close_payload(1001, "off"), None),
        (close_payload(1011, "out of memory"), "1011: out of memory"),
    ],
)
async def test_close_of_the_peer_is_the_end_or_an_error_by_its_code(payload: bytes, words: str | None) -> None:
    raw = Raw(client=False)
    await raw.send(Opcode.BINARY, b"last")
    await raw.send(Opcode.CLOSE, payload)
    assert await raw.stream.receive_some() == b"last"
    if words is None:
        assert await raw.stream.receive_some() == b""
        assert await raw.stream.receive_some() == b""
    else:
        with pytest.raises(trio.BrokenResourceError, match=words):
            await raw.stream.receive_some()
    assert (await raw.frame())[0] is Opcode.CLOSE
    with pytest.raises(trio.BrokenResourceError):
        await raw.stream.send_all(b"x")


async def test_cut_without_a_close_is_an_error() -> None:
    raw = Raw(client=False)
    await raw.send(Opcode.BINARY, b"something")
    await raw.wire.aclose()
    assert await raw.stream.receive_some() == b"something"
    with pytest.raises(trio.BrokenResourceError, match="ended without the end of the websocket"):
        await raw.stream.receive_some()


async def test_stream_that_is_cancelled_still_says_that_it_goes() -> None:
    near, far = socket_pair()
    one, other = WebSocketStream(near, client=True), WebSocketStream(far, client=False)
    await one.send_all(b"x")
    with trio.CancelScope() as scope:
        scope.cancel()
        await one.aclose()
    assert await other.receive_some() == b"x"
    assert await other.receive_some() == b""
    await trio.aclose_forcefully(other)


async def test_cancelled_write_leaves_nothing_that_can_be_written() -> None:
    """Rule C3: an unknown part of the data has been sent."""
    near, far = lockstep_stream_pair()
    stream = WebSocketStream(near, client=True)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"x" * 1000)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    with pytest.raises(trio.BrokenResourceError, match="was cut"):
        await stream.send_all(b"y")
    await trio.aclose_forcefully(stream)
    await trio.aclose_forcefully(far)


# -- the opening handshake ---------------------------------------------------------------------------------------------

REQUEST = (
    b"GET /x HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.mark.parametrize(
    ("request_", "words", "answer"),
    [
        (REQUEST + b"Origin: https://example.com\r\n\r\n", "a page in a browser", b"HTTP/1.1 403"),
        (REQUEST.replace(b"/x", b"/y") + b"\r\n", "it asks for '/y', and here is '/x'", b"HTTP/1.1 404"),
        (REQUEST.replace(b"13", b"12") + b"\r\n", "no request for a websocket", b"HTTP/1.1 426"),
        (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "no request for a websocket", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\nHost: h\r\ncontent-length: 0\r\n\r\n", "no request for a websocket", b"HTTP/1.1 400"),
        (b"QEVM\0\0\0\3\r\n\r\n", "no request for a websocket", b"HTTP/1.1 400"),
        (b"\x16\x03\x01" + bytes(20_000), "what came is not HTTP", b""),
        (b"GET", "closed in the opening handshake", b""),
    ],
)
async def test_bad_request_is_answered_and_named(request_: bytes, words: str, answer: bytes) -> None:
    near, far = memory_stream_pair()
    await far.send_all(request_)
    await far.send_eof()
    with pytest.raises(TransportFailed, match=words):
        await _websocket.open_server(near, "/x", "the test")
    got = b""
    while part := await far.receive_some():
        got += part
    assert got.startswith(answer)
    assert bool(got) is bool(answer)


async def test_bytes_behind_the_request_are_the_beginning_of_the_stream() -> None:
    near, far = memory_stream_pair()
    early = bytearray(b"early")
    mask(memoryview(early), KEY)
    head = Header(opcode=Opcode.BINARY, final=True, length=5, key=KEY).encode()
    await far.send_all(REQUEST + b"\r\n" + head + early)
    stream = await _websocket.open_server(near, "", "the test")
    assert await stream.receive_some() == b"early"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "the server answered 404"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /y\r\ncontent-length: 0\r\n\r\n", "the server answered 301"),
        (b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n", "accept"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "HTTP"),
        (b"", "closed in the opening handshake"),
    ],
)
async def test_bad_answer_is_named(answer: bytes, words: str) -> None:
    near, far = memory_stream_pair()
    await far.send_all(answer)
    await far.send_eof()
    with pytest.raises(TransportFailed, match=words):
        await _websocket.open_client(near, "h:1", "/", "ws://h:1/")
    with pytest.raises(trio.ClosedResourceError):
        await near.send_all(b"x")


async def test_silent_peer_has_a_limited_time(autojump_clock: trio.testing.MockClock) -> None:
    near, _one = memory_stream_pair()
    with pytest.raises(TransportFailed, match="no answer within 20 s"):
        await _websocket.open_client(near, "h:1", "/", "ws://h:1/")
    near, _other = memory_stream_pair()
    with pytest.raises(TransportFailed, match="no request within 20 s"):
        await _websocket.open_server(near, "", "the test")


async def test_cancelled_handshake_leaves_no_task_and_no_connection() -> None:
    """T3."""
    before = trio.lowlevel.current_statistics().tasks_living
    for opening in (_websocket.open_client, _websocket.open_server):
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            if opening is _websocket.open_client:
                nursery.start_soon(_websocket.open_client, near, "h:1", "/", "x")
            else:
                nursery.start_soon(_websocket.open_server, near, "", "x")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        while await far.receive_some():
            pass
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_path_of_the_listener_must_be_asked_for() -> None:
    near, far = await try_both("ws://127.0.0.1:0/vm", Config(), Config(), lambda uri: uri.replace("/vm", "/other"))
    assert "the server answered 404" in str(near)
    assert "it asks for '/other', and here is '/vm'" in str(far)
    async with connected("ws://127.0.0.1:0/vm", Config(), Config()) as (one, other):
        await one.send_all(b"x")
        assert await other.receive_some() == b"x"


# -- whole migrations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_guest_moves_and_no_task_is_left(scheme: str, directory: Path) -> None:
    """B1, T1: every byte, with a return path, and no task left afterwards."""
    config = secure(directory) if scheme == "wss" else Config()
    before = trio.lowlevel.current_statistics().tasks_living
    with peers.source(8 << 20) as guest, peers.machine(8 << 20, running=False) as there:
        async with peers.arriving(there, config, uri=f"{scheme}://127.0.0.1:0/vm") as arrival:
            assert arrival.uri.startswith(f"{scheme}://127.0.0.1:")
            summary = await trimig.migrate(guest, arrival.uri, config)
            assert summary.confirmed
            await arrival.summary()
        assert np.array_equal(peers.memory(there), peers.memory(guest))
        assert there.run_state == "running"
    assert trio.lowlevel.current_statistics().tasks_living == before


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_cancelled_migration_leaves_no_task(side: str) -> None:
    """T3: cancelled in the middle; then the same guest goes to another destination."""
    config = peers.settings(bandwidth=2 << 20)
    before = trio.lowlevel.current_statistics().tasks_living
    with peers.source(8 << 20) as guest:
        with peers.machine(8 << 20, running=False) as there:
            async with peers.arriving(there, config, uri=WS) as arrival:
                scope = trio.CancelScope()

                async def strike() -> None:
                    await arrival.wait_pages(20)
                    (scope if side == "source" else arrival.scope).cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(strike)
                    with scope:
                        result = await outcome(trimig.migrate(guest, arrival.uri, config))
                        assert isinstance(result, trimig.TrimigError)
                await arrival.done.wait()
        assert guest.run_state == "running"
        assert trio.lowlevel.current_statistics().tasks_living == before
        with peers.machine(8 << 20, running=False) as there:
            async with peers.arriving(there, peers.settings(), uri=WS) as arrival:
                await trimig.migrate(guest, arrival.uri, peers.settings())
                await arrival.summary()
            assert np.array_equal(peers.memory(there), peers.memory(guest))


# -- an independent library --------------------------------------------------------------------------------------------


@asynccontextmanager
async def in_thread(function: Callable[[], object]) -> AsyncIterator[None]:
    """*function* runs in a thread beside the block, and must succeed."""
    failures: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except (OSError, AssertionError, websockets.exceptions.WebSocketException) as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(thread.join)
    if failures:
        raise failures[0]


async def test_independent_client_talks_to_our_listener() -> None:
    data = os.urandom(300_000)
    async with transport.listening(WS, lambda _: None) as listener:

        def client() -> None:
            with websockets.sync.client.connect(listener.uri, compression=None) as connection:
                connection.send([data[:100], data[100:70_000], data[70_000:]])  # one message in fragments
                connection.ping("x").wait(5)
                received = b""
                while len(received) < len(data):
                    part = connection.recv()
                    assert isinstance(part, bytes)
                    received += part
                assert received == data[::-1]

        async with in_thread(client):
            stream = await listener.accept()
            assert isinstance(stream, WebSocketStream)
            got = b""
            while len(got) < len(data):
                got += await stream.receive_some()
            assert got == data
            await stream.send_all(data[::-1])
            assert await stream.receive_some() == b""
            await stream.aclose()


async def test_independent_client_is_told_why_its_text_is_refused() -> None:
    async with transport.listening(WS, lambda _: None) as listener:

        def client() -> None:
            with websockets.sync.client.connect(listener.uri) as connection:
                connection.send('{"text": 1}')
                with pytest.raises(websockets.exceptions.ConnectionClosedError) as caught:
                    connection.recv(timeout=10)
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == CloseCode.UNSUPPORTED
                assert "text" in caught.value.rcvd.reason

        async with in_thread(client):
            stream = await listener.accept()
            assert isinstance(stream, WebSocketStream)
            with pytest.raises(trio.BrokenResourceError, match="a text message"):
                await stream.receive_some()
            await stream.aclose()


async def test_our_client_talks_to_an_independent_server() -> None:
    pongs: list[bool] = []

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        for message in connection:
            assert isinstance(message, bytes)
            pongs.append(connection.ping().wait(10))
            connection.send([message[:10], message[10:]])

    data = os.urandom(_websocket.FRAME_SIZE + 400_000)
    with websockets.sync.server.serve(echo, "127.0.0.1", 0, max_size=None, compression="deflate") as server:
        port = server.socket.getsockname()[1]
        async with in_thread(server.serve_forever):
            try:
                stream = await transport.connect(f"ws://127.0.0.1:{port}/any?where")
                assert isinstance(stream, WebSocketStream)
                async with stream:
                    got = bytearray()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(stream.send_all, data)
                        while len(got) < len(data):
                            got += await stream.receive_some()
                assert got == data
            finally:
                server.shutdown()
    assert pongs == [True, True]
