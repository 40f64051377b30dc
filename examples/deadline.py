"""A migration with a deadline: if it takes too long it has no effect, and can be tried again.

    python examples/deadline.py

trimig has no time limit for a migration as a whole: the caller cancels the migration, with any trio cancel scope. A
cancelled migration leaves the application running as before. Here the first attempt uses a link that is far too
slow, and is cancelled after half a second. The second attempt may use all of the bandwidth, and succeeds.
"""

import sys

import numpy as np
import trio

import trimig

SIZE = 32 * trimig.MiB
SLOW = trimig.Config(parameters=trimig.Parameters(max_bandwidth=4 * trimig.MiB))
FAST = trimig.Config(parameters=trimig.Parameters(max_bandwidth=0))


class Counter:
    """An application that counts in its memory."""

    def __init__(self, *, running: bool) -> None:
        self.guest = trimig.AppGuest("counter", running=running)
        self.words = np.frombuffer(self.guest.add_ram("words", SIZE).view, dtype=np.uint64)

    async def count(self) -> None:
        """Count for ever, while the guest runs here."""
        while True:
            try:
                async with self.guest.running():
                    self.words[0] += np.uint64(1)
            except trimig.NotOwner:
                return  # it was handed over
            await trio.sleep(0.001)


async def attempt(source: Counter, config: trimig.Config, seconds: float) -> Counter | None:
    """Migrate *source* to a new Counter within *seconds*; returns it, or None if the time was too short."""
    destination = Counter(running=False)
    monitor = trimig.Monitor()
    arrived = False

    async def receive() -> None:
        nonlocal arrived
        try:
            await trimig.receive(destination.guest, "tcp:127.0.0.1:0", monitor=monitor)
            arrived = True
        except trimig.TrimigError as error:
            print(f"  destination: {error}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        while not monitor.addresses:
            await monitor.wait_changed()
        try:
            with trio.move_on_after(seconds):
                summary = await trimig.migrate(source.guest, monitor.addresses[0], config)
                print(f"  source: done, downtime {summary.downtime * 1000:.1f} ms")
        except trimig.MigrationError as error:
            print(f"  source: {error}; the application runs on here")
    return destination if arrived else None


async def main() -> int:
    """Two attempts."""
    here = Counter(running=True)
    here.words[1:] = 1  # not zero, so that the pages must be sent
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.count)

        print("first attempt, over a slow link:")
        there = await attempt(here, SLOW, seconds=0.5)
        assert there is None
        assert here.guest.run_state == "running"
        before = int(here.words[0])
        await trio.sleep(0.1)
        print(f"  given up; the application counts on here: {before}, {int(here.words[0])}")
        assert int(here.words[0]) > before

        print("second attempt:")
        there = await attempt(here, FAST, seconds=60)
        if there is None:
            nursery.cancel_scope.cancel()  # otherwise the application would count for ever
    assert there is not None
    sound = there.guest.run_state == "running" and bool(np.array_equal(there.words, here.words))
    print(f"  the application runs there, at {int(there.words[0])}: {'equal' if sound else 'NOT EQUAL'}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(trio.run(main))
