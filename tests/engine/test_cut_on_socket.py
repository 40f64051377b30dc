"""A source that goes away in the middle of the memory, over real sockets, where the kernel places the pages."""

from __future__ import annotations

import numpy as np
import pytest
import trio
import trio.testing

import trimig

SIZE = 4 * trimig.MiB


def fill(guest: trimig.AppGuest) -> None:
    guest.add_ram("m0", SIZE).pages[:] = np.random.default_rng(1).integers(0, 256, (SIZE // 4096, 4096), np.uint8)


@pytest.mark.parametrize("cut", [SIZE // 2, SIZE // 2 + 2000])
async def test_a_connection_that_ends_within_consecutive_pages_is_one_typed_error(cut: int) -> None:
    """The end of file is met by the read that places pages by prediction, and must not be predicted away for ever."""
    with trimig.AppGuest("app") as source, trimig.AppGuest("app", running=False) as destination:
        fill(source)
        destination.add_ram("m0", SIZE)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host, port = listeners[0].socket.getsockname()
        outgoing = await trio.testing.open_stream_to_socket_listener(listeners[0])

        async def relay() -> None:
            """Pass *cut* bytes on to the destination, then end properly: a reset would be an error of the socket."""
            incoming = await listeners[0].accept()
            left = cut
            async with incoming, outgoing:
                while left:
                    data = await incoming.receive_some(left)
                    await outgoing.send_all(data)
                    left -= len(data)
                await outgoing.send_eof()
                async for _ in outgoing:
                    pass

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                inward = await listeners[0].accept()
                nursery.start_soon(relay)
                nursery.start_soon(expect_failure, source, f"tcp:{host}:{port}")
                with pytest.raises(trimig.TransportFailed):
                    await trimig.receive(destination, inward)
        await listeners[0].aclose()


async def expect_failure(guest: trimig.AppGuest, uri: str) -> None:
    with pytest.raises(trimig.MigrationError):
        await trimig.migrate(guest, uri)
    assert guest.run_state == "running"
