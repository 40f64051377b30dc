"""``unix:`` on real sockets: the allowed users, and when which file is removed."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from trimig.config import Config
from trimig.errors import ConfigError, TransportFailed
from trimig.transport import unix


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def there(path: str) -> bool:
    """Whether the path exists, also as a dangling link."""
    return os.path.lexists(path)


def fill(path: str) -> None:
    """Make a file that must not be removed."""
    Path(path).write_text("precious")


def content(path: str) -> str:
    """The contents of the file."""
    return Path(path).read_text()


async def talk(listener: unix.UnixListener, path: str) -> None:
    """Connect, send bytes both ways, and close."""
    near = await unix.connect(path, Config())
    far = await listener.accept()
    async with near, far:
        await near.send_all(b"there")
        assert await far.receive_some(5) == b"there"
        await far.send_all(b"back")
        assert await near.receive_some(4) == b"back"


async def test_connection(path: str) -> None:
    """B2, B7."""
    listener = await unix.listen(path, Config())
    try:
        assert listener.uri == f"unix:{path}"
        await talk(listener, path)
    finally:
        listener.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
async def test_socket_is_for_its_owner_only(path: str, umask: int) -> None:
    """From the first moment, because the guest's memory goes through the socket."""
    old = os.umask(umask)
    try:
        listener = await unix.listen(path, Config())
    finally:
        os.umask(old)
    try:
        found = os.stat(path)
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    finally:
        listener.close()


async def test_file_is_removed_on_close(path: str) -> None:
    listener = await unix.listen(path, Config())
    listener.close()
    assert not there(path)
    listener.close()
    with pytest.raises(
        TransportFailed, match=rf"cannot connect to unix:{path}: No such file .*\(does a destination listen"
    ):
        await unix.connect(path, Config())


async def test_file_that_took_its_place_is_left_alone(path: str) -> None:
    first = await unix.listen(path, Config())
    os.rename(path, path + ".old")
    second = await unix.listen(path, Config())
    try:
        first.close()
        await talk(second, path)
    finally:
        second.close()
    assert not there(path)


async def test_file_that_is_gone_already_is_no_error(path: str) -> None:
    listener = await unix.listen(path, Config())
    os.unlink(path)
    listener.close()


async def test_second_close_removes_no_successor(path: str) -> None:
    first = await unix.listen(path, Config())
    first.close()
    second = await unix.listen(path, Config())
    try:
        first.close()
        await talk(second, path)
    finally:
        second.close()


async def test_orphaned_socket_is_replaced(path: str) -> None:
    """The socket file that a killed receiver leaves."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
        killed.listen()
    assert there(path)
    with pytest.raises(TransportFailed, match=r"refused \(does a destination listen there\?\)"):
        await unix.connect(path, Config())
    listener = await unix.listen(path, Config())
    try:
        await talk(listener, path)
    finally:
        listener.close()


async def test_live_socket_is_neither_removed_nor_disturbed(path: str) -> None:
    """The listener must not take the probe for its peer: it accepts only one connection."""
    listener = await unix.listen(path, Config())
    try:
        with pytest.raises(TransportFailed, match=f"cannot listen on unix:{path}: Address already in use"):
            await unix.listen(path, Config())
        near = await unix.connect(path, Config())
        await near.send_all(b"the first connection")
        async with near, await listener.accept() as far:
            assert await far.receive_some() == b"the first connection"
    finally:
        listener.close()


async def test_socket_with_a_full_queue_is_alive(path: str) -> None:
    listener = await unix.listen(path, Config())
    waiting = []
    try:
        for _ in range(8):
            peer = socket.socket(socket.AF_UNIX)
            peer.setblocking(False)
            waiting.append(peer)
            if peer.connect_ex(path):
                break
        with pytest.raises(TransportFailed, match="already in use"):
            await unix.listen(path, Config())
        assert there(path)
    finally:
        for peer in waiting:
            peer.close()
        listener.close()


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file"])
async def test_other_things_are_left_alone(path: str, kind: str) -> None:
    if kind == "directory":
        os.mkdir(path)
    else:
        target = path if kind == "file" else path + ".target"
        fill(target)
        if kind != "file":
            os.symlink(target, path)
    with pytest.raises(TransportFailed, match=f"{path} exists and is no socket; remove it"):
        await unix.listen(path, Config())
    if kind != "directory":
        assert content(path) == "precious"


async def test_dangling_link_is_left_alone(path: str) -> None:
    os.symlink(path + ".nowhere", path)
    with pytest.raises(TransportFailed):
        await unix.listen(path, Config())
    assert there(path)


@pytest.mark.parametrize("call", [unix.connect, unix.listen])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "needs a path"),
        ("/" + "x" * 107, "too long for a socket: at most 107 bytes"),
        ("/" + "ü" * 54, "too long"),
        ("/tmp/a\0b", "NUL"),
        ("\0abstract", "NUL"),
    ],
)
async def test_bad_path_is_refused(call: object, path: str, words: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigError, match=words) as caught:
        await call(path, Config())
    assert caught.value.name == "uri"


async def test_longest_path_works(tmp_path: Path) -> None:
    directory = str(tmp_path)
    path = directory + "/" + "x" * (107 - len(directory) - 1)
    listener = await unix.listen(path, Config())
    try:
        await talk(listener, path)
    finally:
        listener.close()


async def test_directory_that_does_not_exist(path: str) -> None:
    with pytest.raises(TransportFailed, match=f"cannot listen on unix:{path}/s: No such file"):
        await unix.listen(path + "/s", Config())
    with pytest.raises(TransportFailed, match="No such file"):
        await unix.connect(path + "/s", Config())


async def test_socket_without_a_listener(path: str) -> None:
    """B16."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
    with pytest.raises(TransportFailed, match=r"Connection refused \(does a destination listen there\?\)"):
        await unix.connect(path, Config())


async def test_listening_and_connecting_can_be_cancelled(path: str) -> None:
    """Gap G12: and no file is left."""
    with trio.CancelScope() as scope:
        scope.cancel(reason="the test")
        await unix.listen(path, Config())
    assert scope.cancelled_caught
    assert not there(path)
    listener = await unix.listen(path, Config())
    try:
        with trio.CancelScope() as scope:
            scope.cancel(reason="the test")
            await unix.connect(path, Config())
        assert scope.cancelled_caught
    finally:
        listener.close()
