"""``fd:``: sockets and pipes, all other kinds of descriptors, and that a descriptor is used once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

import trimig
from tests.conftest import LeakCheck
from tests.transport.conftest import is_open
from trimig import transport
from trimig.channel.channel import Channel
from trimig.config import Config
from trimig.errors import ConfigError, TransportFailed
from trimig.testing import ScriptedGuest
from trimig.transport import fd

DATA = bytes(range(256)) * 1024


@pytest.mark.parametrize("rest", ["", "name", "-1", "+3", " 3", "3 ", "0x3", "٣", "4.0", "99999999999", "/dev/stdin"])
async def test_what_is_not_a_number_is_refused(rest: str) -> None:
    """B4: only the QMP server knows names; it passes the number on."""
    for call in (fd.connect, fd.listen):
        with pytest.raises(ConfigError, match="needs the number of an open descriptor") as caught:
            await call(rest, Config())
        assert caught.value.name == "uri"


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
async def test_socket_has_both_directions(family: socket.AddressFamily) -> None:
    """B4, B7."""
    if family is socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
    near = await fd.connect(str(ours.detach()), Config())
    listener = await fd.listen(str(theirs.detach()), Config())
    far = await listener.accept()
    listener.close()
    assert isinstance(near, trio.SocketStream)
    assert isinstance(far, trio.SocketStream)
    assert not os.get_inheritable(near.socket.fileno())
    async with near, far:
        await near.send_all(b"there")
        assert await far.receive_some(9) == b"there"
        await far.send_all(b"back")
        assert await near.receive_some(9) == b"back"


async def test_pipe_has_one_direction_and_says_so(pipe: tuple[int, int]) -> None:
    """B4, B7: from this the engine knows that there is no return path."""
    reading, writing = pipe
    sender = await fd.connect(str(writing), Config())
    listener = await fd.listen(str(reading), Config())
    assert listener.uri == f"fd:{reading}"
    receiver = await listener.accept()
    out, into = Channel(sender), Channel(receiver)
    assert (out.sends, out.receives) == (True, False)
    assert (into.sends, into.receives) == (False, True)
    assert not os.get_inheritable(writing)

    got = bytearray()

    async def receive() -> None:
        async with receiver:
            while data := await receiver.receive_some():
                got.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        async with sender:
            for _ in range(20):  # more than the pipe holds
                await sender.send_all(DATA)
            await sender.wait_send_all_might_not_block()
    assert bytes(got) == DATA * 20
    assert not is_open(reading)
    assert not is_open(writing)


@pytest.mark.parametrize("blocking", [True, False])
async def test_mode_of_a_pipe_is_what_it_was(pipe: tuple[int, int], *, blocking: bool) -> None:
    """B18: all processes with the pipe share the mode; a shell would fail with EAGAIN."""
    for end, call in zip(pipe, (fd.listen, fd.connect), strict=True):
        other = os.dup(end)
        try:
            os.set_blocking(end, blocking)
            opened = await call(str(end), Config())
            assert not os.get_blocking(other)
            if isinstance(opened, fd.FdListener):
                opened.close()
                opened.close()
                with pytest.raises(TransportFailed, match="used already"):
                    await opened.accept()
            else:
                await opened.aclose()
            assert os.get_blocking(other) is blocking
        finally:
            os.close(other)


async def test_descriptor_is_used_once(pipe: tuple[int, int]) -> None:
    """B4, A.1 row 16."""
    _, writing = pipe
    await (await fd.connect(str(writing), Config())).aclose()
    for call in (fd.connect, fd.listen):
        with pytest.raises(TransportFailed, match=f"descriptor {writing} is not open"):
            await call(str(writing), Config())
    listener = await fd.listen(str(pipe[0]), Config())
    await (await listener.accept()).aclose()
    with pytest.raises(TransportFailed, match="used already"):
        await listener.accept()


def _listening() -> int:
    return socket.create_server(("127.0.0.1", 0)).detach()


def _unconnected() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()


def _messages() -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours.detach()


USELESS: Final[dict[str, tuple[Callable[[Path], int], str]]] = {
    "file": (lambda path: os.open(path / "file", os.O_RDWR | os.O_CREAT), r"is a file \(use file:PATH"),
    "directory": (lambda path: os.open(path, os.O_RDONLY), "is a directory"),
    "terminal": (lambda path: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), "is a terminal or another"),
    "device": (lambda path: os.open("/dev/null", os.O_RDWR), "is a terminal or another character device"),
    "listening": (lambda path: _listening(), "is a listening socket"),
    "unconnected": (lambda path: _unconnected(), "is a socket that is not connected"),
    "messages": (lambda path: _messages(), "is a socket of messages"),
}


@pytest.mark.parametrize("kind", USELESS)
async def test_what_carries_no_stream_is_refused_and_closed(kind: str, tmp_path: Path) -> None:
    """B4: the descriptor is consumed all the same."""
    make, words = USELESS[kind]
    for call in (fd.connect, fd.listen):
        number = make(tmp_path)
        with pytest.raises(TransportFailed, match=f"descriptor {number} {words}"):
            await call(str(number), Config())
        assert not is_open(number)


async def test_fifo_of_both_directions_is_refused(tmp_path: Path) -> None:
    """The pipe would return the stream to its sender."""
    os.mkfifo(tmp_path / "fifo")
    for call in (fd.connect, fd.listen):
        number = os.open(tmp_path / "fifo", os.O_RDWR)
        with pytest.raises(TransportFailed, match="is a FIFO opened for both directions"):
            await call(str(number), Config())
        assert not is_open(number)


async def test_wrong_end_of_a_pipe_is_refused_and_closed(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with pytest.raises(TransportFailed, match=f"descriptor {reading} is the reading end of a pipe: .* the writing end"):
        await fd.connect(str(reading), Config())
    with pytest.raises(TransportFailed, match=f"descriptor {writing} is the writing end of a pipe: .* the reading end"):
        await fd.listen(str(writing), Config())
    assert not is_open(reading)
    assert not is_open(writing)


async def test_what_the_run_loop_itself_needs_is_refused_and_left_alone() -> None:
    """A mistyped number must not break the process."""
    loop = next(n for n in os.listdir("/proc/self/fd") if "eventpoll" in _target(n))
    for call in (fd.connect, fd.listen):
        with pytest.raises(TransportFailed, match="something of the kernel's"):
            await call(loop, Config())
    await trio.sleep(0.001)


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""


async def test_cancelled_call_closes_the_descriptor(pipe: tuple[int, int]) -> None:
    """T3."""
    ours, theirs = socket.socketpair()
    reading, writing = pipe
    numbers = (ours.detach(), theirs.detach(), reading, writing)
    calls = (fd.connect, fd.listen, fd.listen, fd.connect)
    for call, number in zip(calls, numbers, strict=True):
        with trio.CancelScope() as scope:
            scope.cancel(reason="the test")
            await call(str(number), Config())
        assert scope.cancelled_caught
        assert not is_open(number)


async def test_listening_that_is_left_closes_the_descriptor(pipe: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    for number in (pipe[0], ours.detach()):
        told: list[str] = []
        async with transport.listening(f"fd:{number}", told.append):
            assert told == [f"fd:{number}"]
        assert not is_open(number)


async def test_reader_that_is_gone_is_a_broken_pipe(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    async with await fd.connect(str(pipe[1]), Config()) as sender:
        with pytest.raises(trio.BrokenResourceError):
            await sender.send_all(DATA)


@pytest.mark.parametrize("direction", ["out", "in"])
async def test_wait_on_a_pipe_can_be_cancelled(pipe: tuple[int, int], direction: str) -> None:
    check = LeakCheck()
    listener = await fd.listen(str(pipe[0]), Config())
    receiver = await listener.accept()
    async with receiver, await fd.connect(str(pipe[1]), Config()) as sender:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if direction == "out":
                    nursery.start_soon(sender.send_all, DATA * 20)
                else:
                    nursery.start_soon(receiver.receive_some)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel(reason="the test")
        assert scope.cancelled_caught
    assert check.leaks() == []


@pytest.mark.parametrize("kind", ["socket", "pipe"])
async def test_guest_goes_through_descriptors(kind: str) -> None:
    """B4, B7, A.1 row 16, T to T: over a socket with an answer, over a pipe without; no descriptor is left."""
    check = LeakCheck()
    if kind == "socket":
        ours, theirs = socket.socketpair()
        out, into = ours.detach(), theirs.detach()
    else:
        into, out = os.pipe()
    source, target = ScriptedGuest(run_state="running"), ScriptedGuest(run_state="prelaunch")
    received: list[trimig.Summary] = []

    async def receive() -> None:
        received.append(await trimig.receive(target, f"fd:{into}"))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            summary = await trimig.migrate(source, f"fd:{out}")
    assert target.run_state == "running"
    assert source.run_state == "paused"
    assert summary.confirmed is summary.prepared is (kind == "socket")
    assert any("no return path" in text for text in summary.warnings) is (kind == "pipe")
    assert check.leaks() == []
