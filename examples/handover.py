"""A rolling upgrade: an application under load hands its 64 MiB table to its successor, and no update is lost.

    python examples/handover.py

Starts examples/receiver.py as the successor, a separate process, and migrates the application's state to it while
requests keep changing that state. The application stops for milliseconds only. The successor continues the work, checks
the table against the ledger, and its exit code says whether they agree.
"""

import subprocess
import sys
from pathlib import Path

import trio
from receiver import Sessions  # type: ignore[import-not-found]  # stands beside this file, which mypy does not expect

import trimig

SUCCESSOR = Path(__file__).with_name("receiver.py")


async def main() -> int:
    """Serve, start the successor, hand over; returns the successor's exit code."""
    sessions = Sessions(running=True)
    sessions.fill()
    # A successor on another host would get the address to listen at, for example tcp:0.0.0.0:4444.
    command = [sys.executable, str(SUCCESSOR), "tcp:127.0.0.1:0"]
    successor = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert successor.stdout is not None
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(sessions.work)
            address = (await successor.stdout.receive_some()).decode().strip()
            try:
                summary = await trimig.migrate(sessions.guest, address)
            except trimig.TrimigError as error:
                # After a MigrationError the guest still runs in this process. A real application would serve on.
                print(f"not handed over, the owner is {sessions.guest.owner.value}: {error}")
                nursery.cancel_scope.cancel()
                return 1
            # From here on the successor owns the table. The tasks of this process are told so, and end.
        print(
            f"handed over after {sessions.ledger.updates} updates: {summary.total_time:.2f} s, "
            f"{summary.iterations} passes, downtime {summary.downtime * 1000:.1f} ms, "
            f"dirty tracking by {summary.dirty_tracking}"
        )
        said = b"".join([words async for words in successor.stdout])
        print(said.decode().strip())
        return await successor.wait()
    finally:
        successor.kill()


if __name__ == "__main__":
    sys.exit(trio.run(main))
