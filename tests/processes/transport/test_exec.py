"""``exec:`` with real children: both directions, every end of a command, and no process left behind."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import LeakCheck
from trimig import transport
from trimig.channel.channel import Channel
from trimig.channel.streams import Delivering, PerhapsSilent
from trimig.config import Config
from trimig.errors import ConfigError, TransportFailed
from trimig.transport import _child, exec

#: Seconds for a test; nothing is asserted about it.
LIMIT = 60
PATTERN = bytes(range(256)) * 4096


@asynccontextmanager
async def command(text: str) -> AsyncIterator[exec.ExecStream]:
    """A command that takes a stream; it is ended with the block."""
    with trio.fail_after(LIMIT):
        async with await exec.connect(text, Config()) as stream:
            yield stream


@asynccontextmanager
async def incoming(text: str) -> AsyncIterator[exec.ExecStream]:
    """A command that brings a stream."""
    with trio.fail_after(LIMIT):
        listener = await exec.listen(text, Config())
        async with await listener.accept() as stream:
            yield stream
        listener.close()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """All bytes up to the end."""
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


async def read_line(stream: trio.abc.ReceiveStream) -> str:
    """One line, read byte by byte."""
    data = b""
    while not data.endswith(b"\n"):
        data += await stream.receive_some(1)
    return data.decode().strip()


def alive(group: int) -> list[int]:
    """The processes of a group that are not zombies of init."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has just ended
        if int(of_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


async def gone(group: int) -> None:
    """Wait until a group that was sent SIGKILL has ended: for a process that is not a child the kernel may need a
    moment."""
    while alive(group):  # noqa: ASYNC110 - there is no event for it
        await trio.sleep(0.005)


@pytest.mark.parametrize(
    ("rest", "words"),
    [("", "needs a command"), ("  ", "needs a command"), ("a\0b", "NUL byte"), ("x" * (1 << 17), "too long")],
)
async def test_what_cannot_be_a_command_is_refused(rest: str, words: str) -> None:
    for call in (exec.connect, exec.listen):
        with pytest.raises(ConfigError, match=words) as caught:
            await call(rest, Config())
        assert caught.value.name == "uri"


async def test_stream_goes_to_its_stdin_through_a_shell(tmp_path: Path) -> None:
    """B3: the shell handles redirection, pipes and quotes; delivered() returns when the command has ended."""
    path = tmp_path / "a file"
    async with command(f"cat | cat > '{path}'") as stream:
        await stream.send_all(PATTERN)
        await stream.delivered()
        assert path.read_bytes() == PATTERN
        await stream.delivered()  # a second call returns at once


async def test_stream_comes_from_its_stdout(tmp_path: Path) -> None:
    """B7."""
    path = tmp_path / "stream"
    path.write_bytes(PATTERN)
    async with incoming(f"cat {path}") as stream:
        assert await read_all(stream) == PATTERN
        assert await stream.receive_some() == b""


async def test_both_directions_at_once() -> None:
    """The other pipe is the return path; more data than the pipes hold goes round, and the end with it."""
    for role in (command, incoming):
        async with role("cat") as stream:
            back: list[bytes] = []

            async def read(stream: trio.abc.ReceiveStream = stream, back: list[bytes] = back) -> None:
                back.append(await read_all(stream))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await stream.send_all(PATTERN * 8)
                await stream.send_eof()
            assert back == [PATTERN * 8]


async def test_listener_runs_nothing_before_it_is_waited_for(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    told: list[str] = []
    async with transport.listening(f"exec:touch {mark}", told.append) as listener:
        assert told == [f"exec:touch {mark}"]
        assert not mark.exists()
        async with await listener.accept() as stream:
            assert isinstance(stream, exec.ExecStream)
            assert await read_all(stream) == b""
        assert mark.exists()


async def test_only_a_command_that_takes_the_stream_may_be_silent() -> None:
    async with command("cat") as stream, incoming("cat") as other:
        assert isinstance(stream, PerhapsSilent)
        assert isinstance(stream, Delivering)
        assert stream.perhaps_silent
        assert not other.perhaps_silent


async def test_command_inherits_nothing_but_its_three_pipes() -> None:
    """Not even inheritable descriptors."""
    fd = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(fd, True)
    try:
        async with command("exec ls /proc/self/fd") as stream:
            names = (await read_all(stream)).decode().split()
    finally:
        os.close(fd)
    assert names == ["0", "1", "2", "3"]  # the last is the directory that ls reads


async def test_command_has_a_session_of_its_own() -> None:
    """A Ctrl-C at the terminal ends the migration in order; it must not end the command before that."""
    async with command("cat") as stream:
        assert os.getsid(stream.pid) == os.getpgid(stream.pid) == stream.pid != os.getsid(0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat > /dev/null; exit 3", "failed with exit status 3$"),
        ("cat > /dev/null; echo no space >&2; exit 1", 'failed with exit status 1; it said: "no space"'),
        ("cat > /dev/null; kill -9 $$", "was ended by signal SIGKILL"),
        ("cat > /dev/null; kill -40 $$", "was ended by signal (40|SIGRT)"),
        ("cat > /nonexistent/file", r"failed with exit status [12]; it said: .*nonexistent"),
        ("/nonexistent/command", "failed with exit status 127; it said: .*not found"),
        ("true", "does not read its input any more"),
        ("sleep 0.1; exit 0", r"does not read its input any more \(7 bytes were left\)"),
        ("exec 0<&-; sleep 0.1", "does not read its input any more"),
    ],
)
async def test_delivery_to_a_command_that_does_not_end_well_has_failed(text: str, words: str) -> None:
    """QEMU ignores the exit status and the unread rest of the pipe (stream.md part 13); for trimig both are
    failures."""
    async with command(text) as stream:

        async def send() -> None:
            await Channel(stream).send(b"1234567")  # a command that ends quickly is noticed here already
            await stream.delivered()

        with pytest.raises(TransportFailed, match=words) as caught:
            await send()
        assert text[:50] in str(caught.value)


async def test_command_that_ends_while_it_is_written_to_is_named_with_its_reason() -> None:
    async with command("head -c 100000 > /dev/null; echo enough >&2; exit 9") as stream:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.send_all(PATTERN * 8)
        assert isinstance(caught.value.__cause__, TransportFailed)
        channel = Channel(stream)
        with pytest.raises(TransportFailed, match=r'exit status 9; it said: "enough"'):
            await channel.send(b"x")
        assert channel.poisoned


async def test_command_that_closes_its_stdin_and_lives_is_not_waited_for() -> None:
    async with command("exec 0<&-; echo busy >&2; sleep 1000") as stream:
        with pytest.raises(trio.BrokenResourceError, match="does not read its input any more"):
            await stream.send_all(PATTERN * 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo -n abc; exit 4", "exit status 4"),
        ("echo -n abc; echo gone >&2; kill -TERM $$", 'signal SIGTERM; it said: "gone"'),
        ("echo -n abc; exec >&-; exit 5", "exit status 5"),
    ],
)
async def test_end_of_a_command_that_failed_is_an_error(text: str, words: str) -> None:
    """The bytes that the command wrote before can still be read."""
    async with incoming(text) as stream:
        channel = Channel(stream)
        view = memoryview(bytearray(10))
        got = b""
        while len(got) < 3:
            got += bytes(view[: await channel.receive_into(view)])
        assert got == b"abc"
        with pytest.raises(TransportFailed, match=words):
            await channel.receive_into(view)


async def test_end_of_a_command_that_lives_on_is_an_end() -> None:
    async with command("exec >&-; cat > /dev/null") as stream:
        assert await stream.receive_some() == b""
        await stream.send_all(b"still read")
        await stream.delivered()


async def test_much_on_stderr_neither_blocks_the_command_nor_is_kept() -> None:
    """8 MiB of error messages: the error shows their end, in one line."""
    noise = "head -c 8388608 /dev/zero | tr '\\0' 'x' >&2; printf 'last\\nwords\\033[31m' >&2"
    async with command(f"cat > /dev/null; {noise}; exit 2") as stream:
        await stream.send_all(b"abc")
        with pytest.raises(TransportFailed, match="exit status 2") as caught:
            await stream.delivered()
        text = str(caught.value)
        assert text.endswith('xlast words\N{REPLACEMENT CHARACTER}[31m"')
        assert len(text) < 700
        assert text.isprintable()


async def test_two_writers_at_once_are_refused() -> None:
    async with command("sleep 1000") as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, PATTERN * 8)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for call in (stream.send_eof, stream.wait_send_all_might_not_block):
            with pytest.raises(trio.BusyResourceError):
                await call()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_closed_stream_is_closed() -> None:
    async with command("cat") as stream:
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()


async def test_command_that_cannot_be_started_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: object, **options: object) -> trio.Process:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(trio.lowlevel, "open_process", refuse)
    with pytest.raises(TransportFailed, match="'cat' cannot be started: Resource temporarily unavailable"):
        await exec.connect("cat", Config())


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "cat > /dev/null",
        "sleep 1000",
        "trap '' TERM; echo ready; while :; do sleep 1000; done",
        "sleep 1000 & sleep 1000 | cat > /dev/null & wait",
        "(trap '' TERM; exec sleep 1000) & exit 0",
        "kill -STOP $$",
        "exit 0",
    ],
)
async def test_closing_ends_the_command_and_its_whole_group(text: str, *, cancelled: bool) -> None:
    """Also if the command ignores SIGTERM, and in a cancelled scope; no process of it stays, not even a zombie."""
    check = LeakCheck()
    with trio.fail_after(LIMIT):
        stream = await exec.connect(f"echo $$; {text}", Config())
        assert await read_line(stream) == str(stream.pid)
        with trio.CancelScope() as scope:
            if cancelled:
                scope.cancel(reason="the test")
            await stream.aclose()
        assert scope.cancelled_caught is cancelled
        await gone(stream.pid)
    assert check.leaks() == []


async def test_what_the_command_left_in_the_background_is_ended_after_it() -> None:
    """The shell ended long before; its group still has a process."""
    async with command("(trap '' TERM; exec sleep 1000) > /dev/null 2>&1 & echo $!") as stream:
        pid = int(await read_line(stream))
        await stream.delivered()
        assert alive(stream.pid) == [pid]
    with trio.fail_after(LIMIT):
        while alive(stream.pid):  # no process is left that could report the effect of SIGKILL
            await trio.lowlevel.checkpoint()


async def test_command_that_is_killed_by_others_is_collected() -> None:
    check = LeakCheck()
    async with command("cat > /dev/null") as stream:
        os.kill(stream.pid, signal.SIGKILL)
        await stream.send_all(b"")
        with pytest.raises(TransportFailed, match="SIGKILL"):
            await stream.delivered()
    assert check.leaks() == []


async def test_where_children_are_collected_by_the_kernel_the_status_is_unknown() -> None:
    """SIGCHLD ignored: the status is lost, and a delivery without a status is no delivery."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        async with command("cat > /dev/null") as stream:
            await stream.send_all(b"abc")
            with pytest.raises(TransportFailed, match="an unknown status"):
                await stream.delivered()
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_without_descriptors_for_processes_the_exit_is_still_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.3."""

    def missing(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", missing)
    async with command("cat > /dev/null; exit 6") as stream:
        await stream.send_all(b"abc")
        with pytest.raises(TransportFailed, match="exit status 6"):
            await stream.delivered()


async def _send(stream: exec.ExecStream) -> None:
    await stream.send_all(PATTERN * 8)


async def _receive(stream: exec.ExecStream) -> None:
    await stream.receive_some()


async def _deliver(stream: exec.ExecStream) -> None:
    await stream.delivered()


@pytest.mark.parametrize("call", [_send, _receive, _deliver])
async def test_each_wait_can_be_cancelled_and_leaves_nothing(
    call: Callable[[exec.ExecStream], Awaitable[None]],
) -> None:
    check = LeakCheck()
    async with command("trap '' TERM; sleep 1000") as stream:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, stream)
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel(reason="the test")
        assert scope.cancelled_caught
    assert check.leaks() == []


@pytest.mark.parametrize("steps", range(6))
async def test_start_that_is_cancelled_leaves_no_child(steps: int) -> None:
    """Before the start of the command or just after: either there is a stream to close, or no command runs."""
    check = LeakCheck()
    made: list[exec.ExecStream] = []

    async def start() -> None:
        made.append(await exec.connect("sleep 1000", Config()))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel(reason="the test")
        for stream in made:
            await stream.aclose()
    assert check.leaks() == []


def test_bounds_of_the_end_are_short() -> None:
    """Closing holds a cancellation off for at most that long; it is part of the teardown, which takes seconds."""
    assert Config().teardown_grace > 2 * _child.TERM_SECONDS + _child.VERDICT_SECONDS
