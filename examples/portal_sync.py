"""A program without any async code migrates its state to a successor, after one cancelled attempt.

    python examples/portal_sync.py

Ordinary threads serve requests on a table of 32 MiB. The engine runs in a thread of its own, behind a portal. The first
migration is cancelled half way: the program serves on as before. The second migration hands the table over.
In this example the successor lives in the same process; on another host it would call ``portal.receive``.
"""

import sys
import time

import trimig
from trimig.portal import Portal

SIZE = 32 * trimig.MiB


def state(*, running: bool) -> trimig.AppGuest:
    """The table: filled in the process that uses it, empty in the receiver."""
    guest = trimig.AppGuest("table", running=running)
    table = guest.add_ram("table", SIZE)
    if running:
        table.view[:] = bytes(range(256)) * (SIZE // 256)
    return guest


def main() -> int:
    """Migrate, cancel, migrate again; returns 0 if the successor has every byte."""
    slowly = trimig.Config(parameters=trimig.Parameters(max_bandwidth=8 * trimig.MiB))
    with Portal() as portal, state(running=True) as mine, state(running=False) as successor:
        # A receiver serves one attempt, so the first attempt gets a receiver that is not used again.
        with state(running=False) as idle:
            first = portal.start_receive(idle, "tcp:127.0.0.1:0")
            attempt = portal.start_migrate(mine, first.wait_listening()[0], slowly)
            while attempt.statistics().transferred < trimig.MiB:
                time.sleep(0.01)  # a real program would do its work here
            attempt.cancel("not today")
            try:
                attempt.result()
            except trimig.MigrationCancelled as error:
                print(f"{error}; the table is {mine.run_state} here")
            try:
                first.result()
            except trimig.TrimigError as error:
                print(f"the receiver was told: {error}")
        receiver = portal.start_receive(successor, "tcp:127.0.0.1:0")
        # Blocks like any other call. Ctrl-C would restore the guest before KeyboardInterrupt is raised here.
        try:
            summary = portal.migrate(mine, receiver.wait_listening()[0])
            receiver.result()
        except trimig.MigrationError as error:
            print(f"not handed over; the table is {mine.run_state} here: {error}")
            return 1
        same = bytes(successor.ram[0].pages.data) == bytes(mine.ram[0].pages.data)
        print(
            f"handed over in {summary.total_time:.2f} s, downtime {summary.downtime * 1000:.1f} ms; "
            f"the table is {successor.run_state} there, {'every byte' if same else 'NOT every byte'} of it"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
