"""The behaviours that tests name, one row each, and which test names which: ``python -m tests.rows``.

A test says in its docstring what it is a test of: ``M2, P9: neither paused nor resumed on the way``. Three kinds of names
look alike, so two of them have a word in front:

* ``M2``, ``O1-O4``: a row of :data:`ROWS`, something that a migration must do;
* ``gap G13``, ``gaps G1 and G2``: an entry of :data:`GAPS`, something that QEMU gets wrong and trimig must not;
* ``rule C7``: one of the sixteen rules for code that may be cancelled.

The pages ``trimig/docs/protocol/features.md``, ``states.md`` part 14 and ``design.md`` part 6 have them in full; "A.1 row 16" is
a row of ``qemu-tests.md``. ``tests/test_rows.py`` checks that each name exists. ``python -m tests.rows`` prints the rows with their tests, and those
that no test names.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

TESTS = Path(__file__).parent

_ROWS = """
A1 one migration per guest and monitor
A2 bad parameter at start-up
A3 bad capabilities at start-up
A4 forced configuration section
A5 destination's state before its use
A6 life time of the migration object
A7 defaults of all parameters
A8 bandwidth before the first migration
A9 properties that change the stream
A10 parameters preset at start-up
A11 capabilities preset at start-up
A12 dump of the global properties
A13 no generic device
B1 sending over tcp
B2 sending over unix
B3 sending through a command
B4 sending into a descriptor
B5 RDMA is refused by name
B6 unknown scheme when sending
B7 receiving over every transport
B8 unknown scheme when receiving
B9 waiting for an address
B10 waiting for an address twice
B11 address without waiting for one
B12 second address while listening
B13 second address after a failure
B14 setup event of a receiver
B15 connecting in the background
B16 nobody at the address
B17 TLS
B18 mode of the descriptors
B19 one connection without multifd
B20 all channels are connected
C1 list of the capabilities
C2 capabilities during a migration
C3 capabilities between migrations
C4 postcopy together with compression
C5 postcopy needs the host's support
C6 capability that is not built
C7 switching block migration on
D1 list of the parameters
D2 setting some parameters
D3 range of the compression level
D4 range of the compression threads
D5 range of the throttle
D6 range of the bandwidth
D7 range of the downtime limit
D8 delay between COLO checkpoints
D9 range of the multifd parameters
D10 size of the XBZRLE cache
D11 one bad value changes nothing
D12 null for TLS parameters
D13 bandwidth changed while it runs
D14 cache resized while it runs
D15 incremental block migration
D16 downtime limit changed while it runs
E1 older command for the bandwidth
E2 older command for the downtime
E3 older commands for the cache
E4 argument detach
F1 second migrate is refused
F2 migrate of a waiting machine
F3 migrate of a blocked guest
F4 arguments blk and inc
F5 blk beside the capability block
F6 block capability put back once
F7 second migration starts from zero
F8 address that fails at once
F9 cancel without a migration
F10 cancel in each status
F11 cancel of a stuck write
F12 cancel gives the disks back
F13 continue in a wrong status
F14 continue in the pause
F15 surplus continue
F16 postcopy without the capability
F17 postcopy before any migration
F18 postcopy after the end
F19 moment of the switch to postcopy
F20 postcopy asked for early
G1 query before any migration
G2 members of each status
G3 query during setup
G4 members about RAM
G5 nothing remains at the end
G6 statistics of XBZRLE
G7 percentage of the throttle
G8 statistics of disks
G9 reason of a failure
G10 query at the destination
G11 blocktime of postcopy
G12 times in the statistics
G13 throughput in the statistics
G14 expected downtime left as it is
G15 expected downtime at the start
G16 downtime of postcopy
H1 event for each status
H2 no event without the capability
H3 no event for a lost change
H4 event for each pass
H5 listeners
H6 predicates of a listener
H7 run state at the completed event
I1 blocker while idle
I2 blocker during a migration
I3 blocker with only-migratable
I4 blocker deleted
I5 device that cannot be migrated
I6 several blockers
J1 frames of the return path
J2 answer to a PING
J3 requests with and without name
J4 longest name of a block
J5 SHUT with success or error
J6 SHUT before the connection closes
K1 when a return path is opened
K2 failure before the first byte
K3 invalid message on the return path
K4 SHUT with an error
K5 SHUT with success
K6 any PONG is accepted
K7 request for impossible pages
K8 length of a named request
K9 source waits for SHUT
K10 broken stream wakes the reader
K11 reader ends with the migration
K12 bytes behind SHUT
L1 header and configuration
L2 opening of the return path
L3 announcement of postcopy
L4 setup sections and setup time
L5 loop over the memory
L6 decision to switch over
L7 bandwidth limit of each window
L8 estimate renewed each window
L9 transport fails
L10 throttle ends with the migration
L11 totals of a completed migration
L12 guest restarted after a failure
L13 unknown final status
L14 nothing left after the end
L15 order of connecting
L16 multifd that cannot be set up
M1 suspended guest is woken
M2 run state before the stop
M3 stored run state
M4 stop event at the switchover
M5 rest is sent without a limit
M6 disks given up
M7 disks taken back after a failure
M8 completion waits for SHUT
M9 completed is the last status
M10 run state that cannot be stored
N1 pause in precopy
N2 pause in postcopy
N3 nothing sent in the pause
N4 cancel in the pause
N5 cancel at the start of the pause
N6 control works in the pause
O1 order of the switch to postcopy
O2 discarded ranges
O3 places of PING 2, 3 and 4
O4 contents of the package
O5 failure before the package
O6 failure behind the package
O7 requested pages come next
O8 no page twice
O9 notice after the devices
O10 memory released at the source
O11 end of postcopy
O12 bandwidth of postcopy
O13 all pages have been sent
P1 loading from the start
P2 announced, and ended in precopy
P3 end left to the listening task
P4 load that fails
P5 order at the end of a load
P6 disks that cannot be taken over
P7 announcement on the network
P8 multifd ends badly at a load
P9 run state after a load
P10 first connection is the main one
P11 load of a COLO secondary
P12 pages placed behind the switch
P13 blocktime of each processor
Q1 stream read and written again
Q2 devices read by the description
Q3 section of the run state
Q4 XBZRLE records
Q5 compressed pages
Q6 zero pages
Q7 block continued across sections
Q8 block device records
Q9 completeness at the end
R1 COLO capability
R2 COLO checkpoints
R3 COLO checkpoint times
R4 guest after COLO
R5 COLO without the capability
R6 COLO failover
S1 effect of xbzrle
S2 effect of rdma-pin-all
S3 effect of auto-converge
S4 effect of zero-blocks
S5 effect of compress
S6 effect of events
S7 effect of postcopy-ram
S8 effect of x-colo
S9 effect of release-ram
S10 effect of block
S11 effect of return-path
S12 effect of pause-before-switchover
S13 effect of multifd
S14 effect of postcopy-blocktime
T1 never two owners
T2 owner unknown with a QEMU
T3 every wait has a bound
T4 hostile streams
T5 failure always has a reason
T6 no task left at the end
T7 another attempt after a failure
U1 both roles in one process
U2 statuses of a receiver
U3 multifd receiver that fails
U4 error in the log
U5 very small bandwidth limits
U6 no switchover in the first window
U7 cache that cannot be resized
U8 state reset at a load
U9 migrate after completed
U10 capability named twice
U11 stop and cont while waiting
"""

_GAPS = """
G1 answer lost, two guests run
G2 cancel while the answer is due
G3 no confirmation in one direction
G4 cancel leaves the guest stopped
G5 cancel before the pause hangs
G6 switch that fails leaves it stopped
G7 cancel in postcopy destroys the guest
G8 cancel while paused hangs
G9 early refusal is not heard
G10 rejected capabilities take effect
G11 status changes before the action
G12 cancel of a connect waits
G13 bad stream ends the destination
G14 multifd error blocks the monitor
G15 block capability stays on
G16 old errors stay
G17 run state ignored in postcopy
G18 completeness is not checked
G19 paused guest cannot go again
G20 migrate during COLO
G21 run state aborts the destination
G22 disks stay given up
G23 connection lost with the package
G24 proof lost with the connection
"""


def _table(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.strip().splitlines())


ROWS = _table(_ROWS)
GAPS = _table(_GAPS)
RULES = {f"C{n}": "" for n in range(1, 17)}

Kind = Literal["row", "gap", "rule"]
TABLES: dict[Kind, dict[str, str]] = {"row": ROWS, "gap": GAPS, "rule": RULES}


def _list(letters: str) -> str:
    one = rf"[{letters}]\d{{1,2}}(?:-[{letters}]\d{{1,2}})?"
    return rf"\b{one}(?:(?:, | and ){one})*\b"


#: One name, or several of one kind: "gaps G1, G4-G6 and G11".
_NAMES = re.compile(rf"\b([Gg]ap)s? ({_list('G')})|\b([Rr]ule)s? ({_list('C')})|({_list('A-U')})")
_ONE_OR_SPAN = re.compile(r"([A-U])(\d{1,2})(?:-[A-U](\d{1,2}))?")
_WORDS: dict[str, Kind] = {"gap": "gap", "rule": "rule", "": "row"}


@dataclasses.dataclass(frozen=True)
class Tag:
    """A name in a docstring."""

    kind: Kind
    name: str
    test: str  # "tests/engine/test_pause.py::test_nothing_is_sent_while_it_is_held"
    line: int


def tags_of(text: str) -> Iterator[tuple[Kind, str]]:
    """(kind, name) of each name in *text*; a span gives each of its members."""
    for gap, gaps, rule, rules, rows in _NAMES.findall(text):
        for letter, first, last in _ONE_OR_SPAN.findall(gaps or rules or rows):
            for n in range(int(first), int(last or first) + 1):
                yield _WORDS[(gap or rule).lower()], f"{letter}{n}"


def tags(root: Path = TESTS) -> Iterator[Tag]:
    """Every name in a docstring below *root*."""
    for path in sorted(root.rglob("*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            where = path.relative_to(root.parent).as_posix()
            if not isinstance(node, ast.Module):
                where += f"::{node.name}"
            for kind, name in tags_of(" ".join((ast.get_docstring(node) or "").split())):
                yield Tag(kind, name, where, 1 if isinstance(node, ast.Module) else node.lineno)


def main() -> None:
    """Print each row, the tests that name it, and at the end the rows without one."""
    found: dict[str, list[str]] = {name: [] for name in ROWS}
    for tag in tags():
        if tag.kind == "row" and tag.name in found:
            found[tag.name].append(tag.test)
    for name, tests in found.items():
        sys.stdout.write(f"{name:4} {ROWS[name]}\n" + "".join(f"       {test}\n" for test in tests))
    missing = [name for name, tests in found.items() if not tests]
    sys.stdout.write(f"{len(found) - len(missing)} of {len(found)} rows are named; not: {' '.join(missing)}\n")


if __name__ == "__main__":
    main()
