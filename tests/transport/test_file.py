"""``file:``: the bytes on disk, the bytes around them, and no trace of a failed stream."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.conftest import LeakCheck
from trimig import stream, transport
from trimig.channel.channel import Channel
from trimig.channel.offload import limiter
from trimig.channel.streams import Delivering
from trimig.config import Config
from trimig.errors import ConfigError, StateError, TransportFailed
from trimig.testing import ScriptedGuest
from trimig.transport import file

DATA = bytes(range(256)) * 1024


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("/a", ("/a", 0)),
        ("a,b", ("a,b", 0)),
        ("/a,offset=0", ("/a", 0)),
        ("/a,offset=512", ("/a", 512)),
        ("/a,offset=0x200", ("/a", 512)),
        ("/a,offset=0X1f", ("/a", 31)),
        ("/a,offset=1M", ("/a", 1 << 20)),
        ("/a,offset=1.5k", ("/a", 1536)),
        (f"/a,offset={2**63 - 1}", ("/a", 2**63 - 1)),
    ],
)
def test_address_is_understood(rest: str, expected: tuple[str, int]) -> None:
    assert file.parse(rest) == expected


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("", "needs a path"),
        (",offset=1", "needs a path"),
        ("a\0b", "NUL byte"),
        ("/a,offset=", "the offset of file:/a is wrong: a size is"),
        ("/a,offset=-1", "is wrong"),
        ("/a,offset=x", "is wrong"),
        ("/a,offset=0x", "is wrong"),
        ("/a,offset=0x1M", "is wrong"),
        ("/a,offset=1,offset=2", "is wrong"),
        (f"/a,offset={2**63}", "is too large"),
    ],
)
async def test_bad_address_is_refused(rest: str, words: str) -> None:
    for call in (file.connect, file.listen):
        with pytest.raises(ConfigError, match=words) as caught:
            await call(rest, Config())
        assert caught.value.name == "uri"


@asynccontextmanager
async def reading(rest: str) -> AsyncIterator[trio.abc.ReceiveStream]:
    """The contents of a file."""
    listener = await file.listen(rest, Config())
    async with await listener.accept() as stream:
        listener.close()
        yield stream


async def read_all(rest: str) -> bytes:
    """All of it."""
    data = b""
    async with reading(rest) as stream:
        while more := await stream.receive_some(100_000):
            data += more
    return data


async def write(rest: str, data: bytes = DATA) -> None:
    """A whole stream."""
    async with await file.connect(rest, Config()) as stream:
        await stream.send_all(data)
        await stream.delivered()


async def test_new_file_is_its_owners_only_and_holds_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    old = os.umask(0)
    try:
        async with await file.connect(str(path), Config()) as stream:
            channel = Channel(stream)
            assert (channel.sends, channel.receives) == (True, False)
            assert isinstance(stream, Delivering)
            await stream.wait_send_all_might_not_block()
            await channel.send(DATA)
            await stream.send_all(b"")
            await channel.send(DATA)
            await stream.delivered()
    finally:
        os.umask(old)
    assert path.read_bytes() == DATA * 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await read_all(str(path)) == DATA * 2


@pytest.mark.parametrize("before", [b"", b"short", b"h" * 4096, b"h" * 10_000_000])
async def test_before_the_offset_nothing_changes(tmp_path: Path, before: bytes) -> None:
    """A header of another program (libvirt, for example); the bytes behind the offset are gone."""
    path = tmp_path / "stream"
    path.write_bytes(before)
    path.chmod(0o640)
    await write(f"{path},offset=4k")
    assert path.read_bytes() == before[:4096].ljust(4096, b"\0") + DATA
    assert await read_all(f"{path},offset=0x1000") == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(("mode", "after"), [(0o666, 0o660), (0o644, 0o640), (0o640, 0o640), (0o600, 0o600)])
async def test_file_that_is_replaced_is_closed_to_others(tmp_path: Path, mode: int, after: int) -> None:
    """From then on the file holds the memory of a guest."""
    path = tmp_path / "stream"
    path.write_bytes(b"old")
    path.chmod(mode)
    await write(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == after


async def test_file_of_another_program_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"head")
    path.chmod(0o664)
    await write(f"{path},offset=4")
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert "has the mode 0664: every user" in caplog.text


async def test_new_file_may_begin_with_a_gap(tmp_path: Path) -> None:
    await write(f"{tmp_path}/stream,offset=100")
    assert (tmp_path / "stream").read_bytes() == bytes(100) + DATA


async def test_disk_has_the_file_and_its_name_when_it_is_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    await write(f"{tmp_path}/new")
    assert synced == [f"{tmp_path}/new", str(tmp_path)]
    synced.clear()
    await write(f"{tmp_path}/new")
    assert synced == [f"{tmp_path}/new"]  # the name was there


@pytest.mark.parametrize("cancelled", [False, True])
async def test_file_that_was_made_for_nothing_is_removed(tmp_path: Path, *, cancelled: bool) -> None:
    """T3: closed without delivery the file leaves no trace, also after a change of the working directory."""
    check = LeakCheck()
    old = os.getcwd()
    os.chdir(tmp_path)
    try:
        stream = await file.connect("stream", Config())
        os.chdir("/")
        await stream.send_all(DATA)
        with trio.CancelScope() as scope:
            if cancelled:
                scope.cancel(reason="the test")
            await stream.aclose()
        assert scope.cancelled_caught is cancelled
    finally:
        os.chdir(old)
    assert os.listdir(tmp_path) == []
    assert limiter().borrowed_tokens == 0
    assert check.leaks() == []


@pytest.mark.parametrize("before", [b"", b"abc", b"h" * 512, b"h" * 9999])
async def test_file_that_was_there_keeps_what_is_not_ours(tmp_path: Path, before: bytes) -> None:
    """Half a stream in the file would be taken for a stream."""
    path = tmp_path / "stream"
    path.write_bytes(before)
    async with await file.connect(f"{path},offset=512", Config()) as stream:
        await stream.send_all(DATA)
    assert path.read_bytes() == before[:512]


async def test_file_that_took_the_place_of_ours_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    async with await file.connect(str(path), Config()):
        os.rename(path, tmp_path / "elsewhere")
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's"


async def test_file_that_is_gone_already_is_not_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with await file.connect(f"{tmp_path}/stream", Config()):
        os.unlink(tmp_path / "stream")
    assert caplog.messages == []


async def test_file_that_cannot_be_removed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    check = LeakCheck()
    async with await file.connect(f"{tmp_path}/stream", Config()):
        monkeypatch.setattr(os, "unlink", refuse)
    assert caplog.messages == [f"half a stream is left in {tmp_path}/stream: Permission denied"]
    assert check.leaks() == []


@pytest.mark.parametrize("kind", ["directory", "fifo", "null", "socket"])
async def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A blocking open of a FIFO would wait for its other end, and could not be cancelled."""
    path = tmp_path / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "null":
        path = Path(os.devnull)
    with trio.fail_after(30), trio.socket.socket(trio.socket.AF_UNIX) as sock:
        if kind == "socket":
            await sock.bind(str(path))
        for call in (file.connect, file.listen):
            with pytest.raises(TransportFailed, match=r"is not a file|Is a directory|it is not a file"):
                await call(str(path), Config())


async def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for call, what in ((file.connect, "write"), (file.listen, "read")):
        with pytest.raises(TransportFailed, match=rf"cannot {what} file:/nonexistent/x: No such file"):
            await call("/nonexistent/x", Config())
    os.symlink("/nonexistent/y", tmp_path / "dangling")
    with pytest.raises(TransportFailed, match=r"dangling: it is a symbolic link to '/nonexistent/y'"):
        await file.connect(f"{tmp_path}/dangling", Config())


async def test_offset_behind_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    with pytest.raises(TransportFailed, match="has 3 bytes: there is nothing at the offset 4"):
        await file.listen(f"{tmp_path}/f,offset=4", Config())
    assert await read_all(f"{tmp_path}/f,offset=3") == b""


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
async def test_disk_that_is_full_fails_the_stream_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    async with await file.connect(f"{tmp_path}/stream", Config()) as stream:
        channel = Channel(stream)
        with pytest.raises(TransportFailed, match=r"cannot write file:.*/stream: No space left"):
            await (channel.send(DATA) if call == "pwrite" else stream.delivered())
    assert os.listdir(tmp_path) == []


async def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    await write(f"{tmp_path}/stream", DATA[:5500])
    assert (tmp_path / "stream").read_bytes() == DATA[:5500]


async def test_read_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "f").write_bytes(DATA)
    async with reading(f"{tmp_path}/f") as stream:
        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(TransportFailed, match=r"cannot read file:.*/f: Input/output error"):
            await Channel(stream).receive_into(memoryview(bytearray(10)))


async def test_closed_streams_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    stream = await file.connect(str(path), Config())
    await stream.delivered()
    await stream.aclose()
    await stream.aclose()
    assert path.exists()
    for call in (stream.delivered, stream.wait_send_all_might_not_block):
        with pytest.raises(trio.ClosedResourceError):
            await call()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"")
    listener = await file.listen(str(path), Config())
    assert listener.uri == f"file:{path}"
    receiver = await listener.accept()
    with pytest.raises(TransportFailed, match="being read already"):
        await listener.accept()
    await receiver.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await receiver.receive_some()


async def test_listening_that_is_left_closes_the_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")
    check = LeakCheck()
    told: list[str] = []
    async with transport.listening(f"file:{tmp_path}/f,offset=0x2", told.append):
        assert told == [f"file:{tmp_path}/f,offset=2"]
    assert check.leaks() == []


@pytest.mark.parametrize("rounds", range(8))
async def test_cancelled_at_any_step_it_never_happened(tmp_path: Path, rounds: int) -> None:
    """Opening, writing, delivering: the file is whole, or does not exist."""
    check = LeakCheck()
    done = False

    async def run() -> None:
        nonlocal done
        stream = await file.connect(f"{tmp_path}/stream", Config())
        try:
            for _ in range(3):
                await stream.send_all(DATA)
            await stream.delivered()
            done = True
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for _ in range(rounds):
            await trio.testing.wait_all_tasks_blocked()  # the next call in a thread
        nursery.cancel_scope.cancel(reason="the test")
    left = os.listdir(tmp_path)
    if left:
        assert (tmp_path / "stream").read_bytes() == DATA * 3
    if done:
        assert left
    assert limiter().borrowed_tokens == 0
    assert check.leaks() == []


async def test_closed_while_it_is_written_to_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of a closed descriptor may soon be another file's: no write may go to it any more."""
    real = os.pwrite
    gate = trio.Event()
    token = trio.lowlevel.current_trio_token()
    inside = trio.Event()

    def slow(fd: int, data: memoryview, at: int) -> int:
        trio.from_thread.run_sync(inside.set, trio_token=token)
        trio.from_thread.run(gate.wait, trio_token=token)
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    stream = await file.connect(f"{tmp_path}/stream", Config())
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(DATA)

        nursery.start_soon(send)
        await inside.wait()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(DATA)
        nursery.start_soon(stream.aclose)
        await trio.testing.wait_all_tasks_blocked()
        assert (tmp_path / "stream").exists()
        gate.set()
    assert not (tmp_path / "stream").exists()


async def test_guest_is_stored_and_fetched(tmp_path: Path) -> None:
    """A migration into a file and out of it, behind another program's header; no return path, and a note about that."""
    path = tmp_path / "guest"
    path.write_bytes(b"HEAD")
    source, target = ScriptedGuest(run_state="running"), ScriptedGuest(run_state="prelaunch")
    summary = await trimig.migrate(source, f"file:{path},offset=4k")
    assert path.read_bytes()[:6] == b"HEAD\0\0"
    assert any("no return path" in text for text in summary.warnings)
    assert source.run_state == "paused"
    await trimig.receive(target, f"file:{path},offset=4k")
    assert target.run_state == "running"


async def test_new_file_of_a_migration_stays_and_that_of_a_cancelled_one_does_not(tmp_path: Path) -> None:
    guest = ScriptedGuest(run_state="running")
    check = LeakCheck()
    for status in ("setup", "active", "device"):
        monitor = trimig.Monitor()
        events = monitor.events()
        async with trio.open_nursery() as nursery:

            async def cancel(status: str = status, events: Any = events, monitor: trimig.Monitor = monitor) -> None:
                async for event in events:
                    if event.name == "MIGRATION" and event.data["status"] == status:
                        monitor.cancel("the test")
                        return

            nursery.start_soon(cancel)
            with pytest.raises(trimig.MigrationCancelled):
                await trimig.migrate(guest, f"file:{tmp_path}/guest", monitor=monitor)
        assert guest.run_state == "running"
        assert os.listdir(tmp_path) == []
    assert check.leaks() == []
    await trimig.migrate(guest, f"file:{tmp_path}/guest")
    assert (tmp_path / "guest").stat().st_size > 0


async def test_file_that_another_trimig_holds_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"a guest")
    with stream.locked(path), pytest.raises(TransportFailed, match="another trimig holds it"):
        await file.connect(str(path), Config())
    assert path.read_bytes() == b"a guest"
    await write(str(path))
    assert path.read_bytes() == DATA


async def test_file_that_is_written_is_held(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    async with await file.connect(str(path), Config()):
        with contextlib.ExitStack() as stack, pytest.raises(StateError, match="held by another trimig"):
            stack.enter_context(stream.locked(path))
