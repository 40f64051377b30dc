"""Why a destination did not take the guest."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
import trio

from tests.processes.cli.command import trimig_command


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_destination_that_ends_without_a_word_is_explained(saved: Path, how: str) -> None:
    """A QEMU that cannot load the stream writes the reason into its own log, and exits."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]

    async def destination() -> None:
        async with listener, await listener.accept() as stream:
            while await stream.receive_some(1 << 16):
                if how == "reset":
                    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(destination)
            code, _, err = await trimig_command("send", saved, f"tcp:127.0.0.1:{port}")
    assert code == 1
    assert "its own log says why" in err
    assert "another machine type or version), another size of the RAM" in err


async def test_destination_that_is_not_there_is_not_explained_so(saved: Path) -> None:
    code, _, err = await trimig_command("send", saved, "tcp:127.0.0.1:1")
    assert (code, "its own log" in err) == (1, False)
