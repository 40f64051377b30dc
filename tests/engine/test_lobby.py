"""The lobby of a receiver, with streams in memory on a virtual clock: which is taken, which waits, which is dropped, what is told.

And its judges, byte by byte. Whole receivers, with sockets, while a source migrates, are in ``test_strangers``.
"""

from __future__ import annotations

import contextlib
import errno
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trimig
from tests.engine.test_postcopy_bad_input import HEAD
from tests.transport.test_hostile_handshakes import client_hello
from trimig import transport
from trimig.channel.channel import AnyStream
from trimig.channel.channels import PREEMPT, Beside
from trimig.channel.first_bytes import judge_again, judge_data, judge_first, judge_other, known
from trimig.channel.lobby import MOST_READ, MOST_WAITING, Lobby, NotTheOne, NotWanted, Verdict, accept_pause
from trimig.errors import RemoteProtocolError, TransportFailed
from trimig.transport.tcp import TcpListener
from trimig.wire import Command, Section
from trimig.wire import encoder as wire

LIMIT = 60
HTTP = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
MULTIFD = bytes.fromhex("1122334400000001") + bytes(56)


# -- the lobby ---------------------------------------------------------------------------------------------------------


class Door:
    """An entrance through which a test sends streams."""

    def __init__(self) -> None:
        self._send, self._taken = trio.open_memory_channel[AnyStream | Exception](1000)
        self.handshake: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.closed = False

    async def meet(self) -> AnyStream:
        found = await self._taken.receive()
        if isinstance(found, Exception):
            raise found
        return found

    async def admit(self, stream: AnyStream) -> AnyStream:
        try:
            await self.handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    def close(self) -> None:
        self.closed = True

    def fail(self, error: Exception) -> None:
        self._send.send_nowait(error)

    def connect(self, data: bytes = b"") -> trio.abc.HalfCloseableStream:
        ours, theirs = trio.testing.memory_stream_pair()
        theirs.receive_stream.put_data(data)
        self._send.send_nowait(theirs)
        return ours


class Tried:
    """A lobby, its door, and what was told of it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.door = Door()
        self.told: list[str] = []
        self.lobby = Lobby(nursery, self.door, lambda _address, reason: self.told.append(reason))


@contextlib.asynccontextmanager
async def lobby() -> AsyncIterator[Tried]:
    with trio.fail_after(3600):  # mostly virtual ones
        async with trio.open_nursery() as nursery:
            tried = Tried(nursery)
            tried.lobby.open()
            yield tried
            nursery.cancel_scope.cancel("the test is over")


def wants(word: bytes) -> Callable[[bytes], Verdict]:
    """A judge for a word."""

    def judge(data: bytes) -> Verdict:
        if data[: len(word)] != word[: len(data)]:
            raise NotTheOne(f"{data[:8]!r} is not {word!r}")
        return Verdict.YES if len(data) >= len(word) else Verdict.MORE

    return judge


async def open_still(stream: trio.abc.Stream) -> bool:
    with trio.move_on_after(0.01):
        try:
            return bool(await stream.receive_some(1))
        except trio.BrokenResourceError:
            return False
    return True


async def test_the_right_one_is_chosen_whatever_came_before(autojump_clock: trio.testing.MockClock) -> None:
    """Silent ones wait, wrong ones are sent away at once, and what was read is handed over."""
    async with lobby() as tried:
        silent = [tried.door.connect() for _ in range(5)]
        slow = tried.door.connect(b"wo")
        wrong = [tried.door.connect(source) for source in (HTTP, b"\xff", b"worx")]
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(600)
                assert not any([await open_still(stream) for stream in wrong])
                await slow.send_all(b"rd and more")

            nursery.start_soon(later)
            chosen = await tried.lobby.choose(wants(b"word"))
        assert chosen.first == b"word and more"
        assert isinstance(chosen.stream, trio.abc.Stream)
        await chosen.stream.send_all(b"hello")
        assert await slow.receive_some() == b"hello"
        assert all([await open_still(stream) for stream in silent])
        assert len(tried.told) == 3
        tried.lobby.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not any([await open_still(stream) for stream in silent])
        assert tried.door.closed
        await trio.aclose_forcefully(chosen.stream)


async def test_waiting_connection_is_judged_again_for_another_place() -> None:
    async with lobby() as tried:
        second = tried.door.connect(b"second")
        first = tried.door.connect(b"first")
        await trio.testing.wait_all_tasks_blocked()
        chosen = await tried.lobby.choose(lambda data: Verdict.YES if data == b"first" else Verdict.MORE)
        assert chosen.first == b"first"
        other = await tried.lobby.choose(lambda data: Verdict.YES if data == b"second" else Verdict.MORE)
        assert other.first == b"second"
        for stream in (first, second, chosen.stream, other.stream):
            await trio.aclose_forcefully(stream)


async def test_a_place_that_a_lone_connection_may_have(autojump_clock: trio.testing.MockClock) -> None:
    """Not at the side of a silent one; and one that is certain comes first."""

    def judge(data: bytes) -> Verdict:
        return {b"perhaps": Verdict.ALONE, b"certain": Verdict.YES}.get(data, Verdict.MORE)

    async with lobby() as tried:
        silent = tried.door.connect()
        tried.door.connect(b"perhaps")
        with trio.move_on_after(100) as limit:
            await tried.lobby.choose(judge)
        assert limit.cancelled_caught
        await silent.aclose()
        chosen = await tried.lobby.choose(judge)
        assert chosen.first == b"perhaps"
        tried.door.connect(b"perhaps")
        tried.door.connect(b"certain")
        other = await tried.lobby.choose(judge)
        assert other.first == b"certain"
        await trio.aclose_forcefully(chosen.stream)
        await trio.aclose_forcefully(other.stream)


async def test_the_oldest_silent_one_makes_room(autojump_clock: trio.testing.MockClock) -> None:
    """More than can wait cost no more descriptors, and the right one is found among a thousand."""
    async with lobby() as tried:
        async with trio.open_nursery() as nursery:
            streams: list[trio.abc.Stream] = []

            async def flood() -> None:
                for _ in range(1000):
                    streams.append(tried.door.connect())
                    await trio.sleep(0.001)
                    assert tried.lobby.waiting <= MOST_WAITING
                streams.append(tried.door.connect(b"word"))

            nursery.start_soon(flood)
            chosen = await tried.lobby.choose(wants(b"word"))
        still = [await open_still(stream) for stream in streams[:-1]]
        assert still == [False] * (1000 - MOST_WAITING + 1) + [True] * (MOST_WAITING - 1)
        assert tried.lobby.dropped == 1000 - MOST_WAITING + 1
        assert len(tried.told) < 20, "so many drops are not told one by one"
        assert "(640 were dropped so far)" in tried.told[-1]
        await trio.aclose_forcefully(chosen.stream)


async def test_where_one_comes_from_is_known(tmp_path: Path) -> None:
    """By address, user or certificate; here by the user of a unix socket."""
    async with trio.open_nursery() as nursery:
        entrance = await transport.listen(f"unix:{tmp_path}/s")
        waiting = Lobby(nursery, entrance, lambda *_: None)
        waiting.open()
        async with await trio.open_unix_socket(f"{tmp_path}/s") as stream:
            await stream.send_all(b"word")
            with trio.fail_after(LIMIT):
                chosen = await waiting.choose(wants(b"word"))
            (origin,) = chosen.origins
            assert origin.startswith("user ")
            await trio.aclose_forcefully(chosen.stream)
        nursery.cancel_scope.cancel("the test is over")


async def test_of_many_that_wait_a_preferred_one_stays() -> None:
    async with lobby() as tried:
        tried.lobby.prefer(frozenset({"address of the source"}))
        first = tried.door.connect()
        await trio.testing.wait_all_tasks_blocked()
        tried.lobby._visitors[0].origins |= {"address of the source"}
        for _ in range(2 * MOST_WAITING):
            tried.door.connect()
        await trio.testing.wait_all_tasks_blocked()
        assert await open_still(first)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN])
async def test_accept_that_fails_once_is_tried_again(code: int, autojump_clock: trio.testing.MockClock) -> None:
    """No descriptors for a while, or a connection that is gone before it is accepted."""
    async with lobby() as tried:
        for _ in range(50):
            tried.door.fail(OSError(code, "no"))
        tried.door.connect(b"word")
        chosen = await tried.lobby.choose(wants(b"word"))
        await trio.aclose_forcefully(chosen.stream)


async def test_a_listener_that_is_broken_is_an_error() -> None:
    assert accept_pause(OSError(errno.EBADF, "")) is None
    async with lobby() as tried:
        tried.door.fail(OSError(errno.EBADF, "Bad file descriptor"))
        with pytest.raises(TransportFailed, match="no more connections can be accepted: Bad file descriptor"):
            await tried.lobby.choose(wants(b"word"))
        with pytest.raises(TransportFailed):
            await tried.lobby.wait_visitor()


@pytest.mark.parametrize("count", [1, 2], ids=["one address", "two addresses"])
async def test_a_connection_in_the_moment_in_which_the_lobby_is_closed(count: int) -> None:
    """It is not needed, and its migration goes on. Which task runs first is drawn, so there are many tries."""
    for _ in range(40):
        sockets = [trio.socket.socket() for _ in range(count)]
        for number, listening in enumerate(sockets, 1):
            await listening.bind((f"127.0.0.{number}", 0))
            listening.listen(5)
        entrance = TcpListener([trio.SocketListener(listening) for listening in sockets])
        async with trio.open_nursery() as nursery:
            tried = Lobby(nursery, entrance, lambda *_: None)
            tried.open()
            await trio.testing.wait_all_tasks_blocked()
            clients = [socket.create_connection(listening.getsockname()) for listening in sockets]
            await trio.lowlevel.checkpoint()
            tried.close()
        for client in clients:
            client.close()


@pytest.mark.parametrize("count", [1, 2], ids=["one address", "two addresses"])
async def test_no_descriptor_left_for_a_connection(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """As with one address, so with two: it is tried again, and the one that is awaited comes in the end."""
    sockets = [trio.socket.socket() for _ in range(count)]
    for number, listening in enumerate(sockets, 1):
        await listening.bind((f"127.0.0.{number}", 0))
        listening.listen(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with trio.fail_after(LIMIT), socket.socket() as client:
        async with trio.open_nursery() as nursery:
            tried = Lobby(nursery, TcpListener([trio.SocketListener(one) for one in sockets]), lambda *_: None)
            tried.open()
            await trio.testing.wait_all_tasks_blocked()
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
                client.connect(sockets[-1].getsockname())
                while "Too many open files" not in caplog.text:  # noqa: ASYNC110 - a log has no event
                    await trio.sleep(0.001)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            client.sendall(b"word")
            chosen = await tried.choose(wants(b"word"))
            await trio.aclose_forcefully(chosen.stream)
            tried.close()


async def test_handshakes_do_not_wait_for_each_other() -> None:
    async with lobby() as tried:
        tried.door.handshake = trio.sleep_forever
        for _ in range(5):
            tried.door.connect(b"word")
        await trio.testing.wait_all_tasks_blocked()
        tried.door.handshake = trio.lowlevel.checkpoint
        tried.door.connect(b"word")
        chosen = await tried.lobby.choose(wants(b"word"))
        await trio.aclose_forcefully(chosen.stream)


async def test_failed_handshake_is_kept_for_the_error() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise TransportFailed("no TLS with it")

    async with lobby() as tried:
        tried.door.handshake = fail
        stream = tried.door.connect()
        await trio.testing.wait_all_tasks_blocked()
        assert not await open_still(stream)
        assert tried.told == ["no TLS with it"]
        assert "no TLS with it" in (tried.lobby.hint() or "")
        assert tried.lobby.hint(frozenset({"address of another"})) is None


async def test_connection_that_says_nothing_of_use_is_read_no_further() -> None:
    async with lobby() as tried:
        stream = tried.door.connect(bytes(10 * MOST_READ))
        with trio.move_on_after(0.05):
            await tried.lobby.choose(lambda _: Verdict.MORE)
        assert not await open_still(stream)
        assert f"{MOST_READ} bytes came" in tried.told[0]


@pytest.mark.parametrize("handshake", [trio.lowlevel.checkpoint, trio.sleep_forever])
async def test_cancelled_lobby_leaves_nothing_open(handshake: Callable[[], Awaitable[None]]) -> None:
    """T3: the listener, those in their handshakes, those that wait, and one that was chosen in that moment."""
    before = trio.lowlevel.current_statistics().tasks_living
    async with lobby() as tried:
        tried.door.handshake = handshake
        streams = [tried.door.connect(data) for data in (b"", b"wo", b"word")]
        with trio.CancelScope() as scope:

            def judge(data: bytes) -> Verdict:
                verdict = wants(b"word")(data)
                if verdict is Verdict.YES or handshake is trio.sleep_forever:
                    scope.cancel("in the moment of the choice")
                return verdict

            if handshake is trio.sleep_forever:
                scope.cancel("before any handshake is over")
            await tried.lobby.choose(judge)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        if handshake is trio.lowlevel.checkpoint:
            assert not await open_still(streams[2]), "the chosen one that was not taken"
    assert tried.door.closed
    assert not any([await open_still(stream) for stream in streams])
    assert trio.lowlevel.current_statistics().tasks_living == before


# -- the judges --------------------------------------------------------------------------------------------------------


def verdicts(judge: Callable[[bytes], Verdict], data: bytes) -> list[Verdict]:
    """Of each beginning of *data*."""
    return [judge(data[:end]) for end in range(1, len(data) + 1)]


def check_scripted(event: object) -> None:
    machine = getattr(event, "machine", None)
    if machine != "scripted":
        raise RemoteProtocolError(f"the stream is of a machine {machine!r}")


def test_main_is_known_when_its_configuration_has_come() -> None:
    judge = judge_first(trimig.Config(), (), check_scripted)
    found = verdicts(judge, HEAD[: HEAD.index(wire.ping(1))])
    at = found.index(Verdict.YES)
    assert set(found[:at]) == {Verdict.MORE}
    assert set(found[at:]) == {Verdict.YES}
    assert at + 1 == len(wire.file_header() + wire.configuration("scripted", ())) + 1
    for wrong in (wire.file_header() + wire.configuration("other", ()) + b"\x08", b"QEVN", b"QEVM\0\0\0\2", b"\0"):
        with pytest.raises(RemoteProtocolError):
            judge(wrong)


def test_main_of_a_type_without_a_configuration_is_known_by_the_next_section() -> None:
    config = trimig.Config(peer=trimig.PeerProfile(send_configuration=False))
    judge = judge_first(config, (), check_scripted)
    assert judge(wire.file_header()) is Verdict.MORE
    assert judge(wire.file_header() + wire.section_start(Section.START, 2, "ram", 0, 4)) is Verdict.YES
    assert judge(wire.file_header() + wire.command(Command.OPEN_RETURN_PATH)) is Verdict.YES
    with pytest.raises(RemoteProtocolError):
        judge(wire.file_header() + b"\x55")


RECV = wire.command(Command.RECV_BITMAP, b"\x03ram")


@pytest.mark.parametrize(
    "data",
    [
        RECV,
        wire.ping(1) + RECV,
        wire.ping(0x74726D01) + wire.ping(2) + RECV,
        struct.pack(">BHH", 8, 0x7401, 5) + b"hello" + struct.pack(">BHH", 8, 0x7403, 16) + bytes(16) + RECV,
    ],
)
def test_recovery_is_known_by_a_bitmap_of_a_block(data: bytes) -> None:
    found = verdicts(judge_again(["rom", "ram"]), data)
    assert found == [Verdict.MORE] * (len(data) - 1) + [Verdict.YES]


@pytest.mark.parametrize(
    "data",
    [
        wire.command(Command.RECV_BITMAP, b"\x04ram2"),
        wire.command(Command.RECV_BITMAP, b"\x02ram"),
        wire.command(Command.RECV_BITMAP, b""),
        struct.pack(">BHH", 8, Command.RECV_BITMAP, 60000),
        wire.command(Command.POSTCOPY_RESUME),
        wire.command(Command.OPEN_RETURN_PATH),
        struct.pack(">BHH", 8, Command.PING, 5),
        struct.pack(">BHH", 8, 0x7404, 4),
        struct.pack(">BHH", 8, 0x7401, 513),
        wire.file_header(),
        b"\x02",
        HTTP,
        MULTIFD,
    ],
)
def test_what_begins_in_another_way_is_no_recovery(data: bytes) -> None:
    with pytest.raises(NotTheOne):
        judge_again(["ram"])(data)


def test_a_named_attempt_may_stand_before_the_bitmap() -> None:
    """Whether it is the right one is looked at behind the choice, because a trimig is told why it is refused."""
    head = wire.ping(0x74726D01) + struct.pack(">BHH", 8, 0x7403, 16) + b"r" * 16
    judge = judge_again(["ram"])
    assert judge(head) is Verdict.MORE
    assert judge(head + RECV) is Verdict.YES
    with pytest.raises(NotTheOne):
        judge(wire.ping(0x74726D01) + struct.pack(">BHH", 8, 0x7403, 15))


@pytest.mark.parametrize(
    ("data", "words"),
    [(MULTIFD, "multifd off at the source"), (client_hello(), "set tls-creds there"), (HTTP, "HTTP request")],
)
def test_first_bytes_that_are_known_say_what_is_wrong(data: bytes, words: str) -> None:
    for judge in (judge_first(trimig.Config(), (), check_scripted), judge_again(["ram"])):
        with pytest.raises(NotTheOne) as caught:
            judge(data)
        assert words in str(caught.value.telling)
        assert isinstance(caught.value, NotWanted) is (data is MULTIFD), (
            "a data channel stays open, or its QEMU may hang"
        )
    assert known(HEAD) is None
    with pytest.raises(NotTheOne) as surplus:
        judge_other(())(data)
    assert (surplus.value.telling is not None) is (data is MULTIFD), "beside the source that has come"
    with pytest.raises(NotTheOne, match="has its source already"):
        judge_other(())(HEAD)


def test_a_connection_that_is_wanted_beside_the_main_one_waits_for_its_turn() -> None:
    """Whatever comes first: it is neither the main one, nor a sign of another setting."""
    channel = Beside(kind=PREEMPT, capability="x", count=2, early=True, magic=MULTIFD[:4])
    for judge in (judge_first(trimig.Config(), (channel,), check_scripted), judge_other((channel,))):
        assert verdicts(judge, MULTIFD) == 3 * [Verdict.MORE] + 61 * [Verdict.LATER]
        with pytest.raises(NotTheOne):
            judge(HTTP)
    assert judge_first(trimig.Config(), (channel,), check_scripted)(HEAD) is Verdict.YES
    assert judge_other((channel,))(HEAD) is Verdict.ALONE


async def test_a_visitor_for_a_later_judge_is_kept_with_all_its_bytes(autojump_clock: trio.testing.MockClock) -> None:
    async with lobby() as tried:
        early = tried.door.connect(b"later" + bytes(MOST_READ))
        tried.door.connect(b"main")

        def judge(data: bytes) -> Verdict:
            return Verdict.LATER if data.startswith(b"l") else Verdict.YES

        assert (await tried.lobby.choose(judge)).first == b"main"
        assert tried.lobby.waiting == 1
        await trio.testing.wait_all_tasks_blocked()
        chosen = await tried.lobby.choose(wants(b"later"))
        assert chosen.first == b"later" + bytes(MOST_READ - 5)
        assert tried.told == []
        await trio.aclose_forcefully(early)


def test_judges_never_fail_in_another_way() -> None:
    source = random.Random(20)
    recover, first = judge_again(["ram"]), judge_first(trimig.Config(), (), check_scripted)
    for good, judge in ((HEAD, first), (wire.ping(1) + RECV, recover)):
        for _ in range(3000):
            data = bytearray(good[: source.randint(1, len(good))])
            for _ in range(source.randint(0, 4)):
                data[source.randrange(len(data))] = source.randrange(256)
            with contextlib.suppress(NotTheOne, RemoteProtocolError):
                judge(bytes(data))


async def test_a_connection_of_other_settings_is_told_of_and_stays_open(autojump_clock: trio.testing.MockClock) -> None:
    """A QEMU may hang if its data channel is closed while it waits for another one. It does not hide that none is there."""

    def check(hello: bytes) -> None:
        if hello[24]:
            raise RemoteProtocolError("it has another number", offset=24, section="multifd")

    async with lobby() as tried:
        judge = judge_data(check, others=False)
        other = tried.door.connect(MULTIFD[:24] + b"\x05" + MULTIFD[25:])
        with pytest.raises(trimig.TransportFailed, match="it has another number"):
            await tried.lobby.choose(judge, lonely=1)
        assert tried.told == ["it is a channel of multifd, it has another number"]
        assert await open_still(other)
        right = tried.door.connect(MULTIFD)
        chosen = await tried.lobby.choose(judge, lonely=1)
        assert chosen.first == MULTIFD
        assert await open_still(right)
        assert "it has another number" in str(tried.lobby.hint())
        tried.lobby.close()
        await trio.sleep(1)
        assert not await open_still(other)
        await trio.aclose_forcefully(chosen.stream)


async def test_what_was_said_before_a_connection_ended_is_kept_for_a_later_judge(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A data channel of a small guest has ended before it is chosen."""
    async with lobby() as tried:
        early = tried.door.connect(MULTIFD + b"packets")
        await early.send_eof()
        await trio.sleep(1)
        chosen = await tried.lobby.choose(judge_data(lambda _: None, others=False))
        assert chosen.first == MULTIFD + b"packets"
        await trio.aclose_forcefully(chosen.stream)
