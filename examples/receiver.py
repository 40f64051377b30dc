"""The receiving side: a process that takes over the state of another one, and continues its work.

    python examples/receiver.py tcp:0.0.0.0:4444     waits at this address for one handover
    python examples/receiver.py                      migrates a table to itself, as a demonstration

The first line on stdout is the address that the process waits at (a port 0 is resolved), so that a program can start
the process and connect to it; examples/handover.py does. The process then works on the received table, checks it, and
exits with 0 if not one update was lost.
"""

import functools
import sys

import numpy as np
import trio

import trimig

TABLE = 64 * trimig.MiB


class Ledger(trimig.Device):
    """The ledger of the table: the sum of all words of the table is ``start`` + ``updates``, modulo 2**64."""

    vmstate = trimig.VMState(
        "ledger", version=1, fields=(trimig.Field("start", "uint64"), trimig.Field("updates", "uint64"))
    )

    def __init__(self) -> None:
        super().__init__()
        self.start = 0
        self.updates = 0


class Sessions:
    """The application: a table in memory that is updated all the time. Both sides declare the same."""

    def __init__(self, *, running: bool) -> None:
        self.guest = trimig.AppGuest("sessions", running=running)
        self.table = np.frombuffer(self.guest.add_ram("table", TABLE).view, dtype=np.uint64)
        self.ledger = Ledger()
        self.guest.add_device(self.ledger)

    def fill(self) -> None:
        """Begin with something."""
        self.table[:] = np.random.default_rng(1).integers(0, 2**63, size=len(self.table), dtype=np.uint64)
        self.ledger.start = int(self.table.sum())

    async def work(self) -> None:
        """Serve requests while the guest runs here: each request changes 100 rows of the first 4 MiB."""
        random = np.random.default_rng()
        while True:
            try:
                async with self.guest.running():
                    first = random.integers(4 * trimig.MiB // 8 - 100)
                    self.table[first : first + 100] += np.uint64(1)
                    self.ledger.updates += 100
            except trimig.NotOwner:
                return  # it was handed over
            await trio.sleep(0.001)

    def is_sound(self) -> bool:
        """Whether table and ledger agree."""
        return int(self.table.sum()) == (self.ledger.start + self.ledger.updates) % 2**64


async def receive(uri: str) -> bool:
    """Wait for one handover on *uri*, continue the work for a moment, and check."""
    sessions = Sessions(running=False)
    monitor = trimig.Monitor()

    async def announce() -> None:
        while not monitor.addresses:
            await monitor.wait_changed()
        print(monitor.addresses[0], flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(announce)
        try:
            await trimig.receive(sessions.guest, uri, monitor=monitor)
        except trimig.MigrationError as error:
            print(f"successor: nothing has arrived: {error}")
            nursery.cancel_scope.cancel()
            return False
    inherited = sessions.ledger.updates
    with trio.move_on_after(0.5):
        await sessions.work()
    sound = sessions.is_sound()
    done = sessions.ledger.updates - inherited
    print(f"successor: {inherited} updates inherited, {done} made since; the table is {'sound' if sound else 'BROKEN'}")
    return sound


async def show() -> bool:
    """Be both sides in one process."""
    before, after = Sessions(running=True), Sessions(running=False)
    before.fill()
    monitor = trimig.Monitor()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(before.work)
        async with trio.open_nursery() as receiving:
            receiving.start_soon(functools.partial(trimig.receive, after.guest, "tcp:127.0.0.1:0", monitor=monitor))
            while not monitor.addresses:
                await monitor.wait_changed()
            summary = await trimig.migrate(before.guest, monitor.addresses[0])
    print(f"received after {after.ledger.updates} updates; downtime {summary.downtime * 1000:.1f} ms")
    return after.is_sound() and after.guest.run_state == "running"


if __name__ == "__main__":
    sys.exit(0 if (trio.run(receive, sys.argv[1]) if len(sys.argv) > 1 else trio.run(show)) else 1)
