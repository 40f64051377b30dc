"""A relay that limits the rate and delays, in a process of its own: ``python -m bench.relay RATE DELAY HOST PORT``.

It stands in for a shaped network where the kernel has none. RATE is in bytes per second, for each direction and for all
connections together; DELAY is in seconds, for each direction. Its first line of output has its address, and it answers
each command ``{"do": "sent"}`` with the bytes that have gone to the destination.
"""

from __future__ import annotations

import math
import sys
from typing import Final

import trio

from bench.trimig_side import commands, say

_PIECE: Final = 64 << 10
#: Seconds of bytes that wait at most: as much as the queue of a switch.
_QUEUE: Final = 0.05


class Direction:
    """The bytes in one direction, of all connections."""

    def __init__(self, rate: float, delay: float) -> None:
        self._rate = rate
        self._delay = delay
        self._free_at = -math.inf
        #: Bytes that were passed on.
        self.passed = 0

    def due(self, count: int, now: float) -> float:
        """When *count* more bytes, which have come at *now*, arrive."""
        self._free_at = max(now, self._free_at) + count / self._rate
        return self._free_at + self._delay

    def wait(self, now: float) -> float:
        """Seconds until there is room for more bytes."""
        return max(0.0, self._free_at - now - _QUEUE)

    async def carry(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        """Pass the bytes of one connection on, and their end.

        **Cancellation:** bytes that were not passed on are lost.
        """
        out, into = trio.open_memory_channel[tuple[float, bytes]](math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver, into, target)
            async with out:
                while True:
                    await trio.sleep(self.wait(trio.current_time()))
                    data = bytes(await source.receive_some(_PIECE))
                    await out.send((self.due(len(data), trio.current_time()), data))
                    if not data:
                        return

    async def _deliver(self, into: trio.MemoryReceiveChannel[tuple[float, bytes]], target: trio.SocketStream) -> None:
        async for due, data in into:
            await trio.sleep_until(due)
            if not data:
                await target.send_eof()
                return
            await target.send_all(data)
            self.passed += len(data)


async def serve(rate: float, delay: float, host: str, port: int) -> None:
    """Accept connections until standard input ends.

    **Cancellation:** all connections are closed.
    """
    forward, back = Direction(rate, delay), Direction(rate, delay)

    async def connection(near: trio.SocketStream) -> None:
        try:
            async with near, await trio.open_tcp_stream(host, port) as far, trio.open_nursery() as nursery:
                nursery.start_soon(forward.carry, near, far)
                nursery.start_soon(back.carry, far, near)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # one side has closed; the other one sees the same

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, connection, [listener])
        say(listening=f"tcp:127.0.0.1:{listener.socket.getsockname()[1]}")
        async for _ in commands():
            say(sent=forward.passed)
        nursery.cancel_scope.cancel()


def main() -> None:
    rate, delay, host, port = sys.argv[1:]
    trio.run(serve, float(rate), float(delay), host, int(port))


if __name__ == "__main__":
    main()
