"""The input of the tools: what cannot be read is an OSError with the name of the input."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from trimig.stream.files import STDIN, reading


async def test_directory_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as refused:
        async with reading(tmp_path):
            raise AssertionError("a directory was opened")
    assert (refused.value.errno, refused.value.filename) == (errno.EISDIR, str(tmp_path))


async def test_pipe_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = os.pipe()
    monkeypatch.setattr(os, "dup", lambda fd: near)
    os.write(far, b"abc")
    os.close(far)
    view = memoryview(bytearray(8))
    async with reading(STDIN) as read_into:
        assert await read_into(view[:2]) == 2
        assert await read_into(view[2:]) == 1
        assert await read_into(view[3:]) == 0
    assert bytes(view[:3]) == b"abc"


async def test_connection_that_breaks_on_standard_input_has_the_reason_of_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = socket.socketpair()
    monkeypatch.setattr(os, "dup", lambda fd: near.detach())
    near.send(b"never read")
    far.close()  # with unread bytes in it: a reset for the other end
    async with reading(STDIN) as read_into:
        with pytest.raises(ConnectionResetError) as broken:
            await read_into(memoryview(bytearray(8)))
    assert (broken.value.errno, broken.value.filename) == (errno.ECONNRESET, STDIN)
