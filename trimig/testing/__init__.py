"""Tools to test a migration, or any trio protocol between two sides, at every point where it can be disturbed.

* :mod:`.link`: :class:`VirtualLink`, a connection with window, rate, latency, chunks and faults, on virtual time;
* :mod:`.streams`: :class:`DribbleStream` passes one byte at a time; :class:`VirtualListener` is for servers without sockets;
* :mod:`.fakes`: :class:`ScriptedGuest`, a guest without a machine;
* :mod:`.lazy`: a guest that runs before all of its memory has come;
* :mod:`.referee`: :class:`OwnerReferee` reports at once that two guests run, or that a guest runs an old state;
* :mod:`.failing`: :class:`FailingGuest` and :class:`FailingStream`, of which call number n raises or hangs;
* :mod:`.determinism`: :func:`deterministic_schedule` repeats a schedule, which sweeps need;
* :mod:`.scenario`: :class:`Scenario`, one run of two sides with an injected event; :func:`replay`;
* :mod:`.sweep`: :func:`run_sweep` over every edge, byte, call and instant; it returns a :class:`SweepReport`.

Sweeps are synchronous. A small run takes a few milliseconds, so sweep every point, in every test run::

    async def body(ctx: SweepContext) -> tuple[str, ...]:
        source, target = ScriptedGuest(dirty_per_sync=2), ScriptedGuest(run_state="prelaunch", content="zero")
        referee = OwnerReferee(source=source, destination=target)
        ends = await ctx.run(
            source=lambda: trimig.migrate(source, ctx.link.a, config),
            destination=lambda: trimig.receive(target, ctx.link.b, config),
        )
        referee.check()
        assert ctx.link.closed
        return (*map(str, ends.values()), *referee.running())

    def test_cancel_anywhere_leaves_one_owner() -> None:
        scenario = Scenario(body=body, link=partial(VirtualLink, window=4096, latency=0.01), exit_within=10)
        run_sweep(scenario, CancelSweep(), CancelSweep(victims=("destination",)), FaultSweep(), TimeLeap()).show()

A failure names its point: ``replay(scenario, point)`` runs that one alone, under a debugger if you like.
"""

from .determinism import deterministic_schedule as deterministic_schedule
from .edges import EDGE_KINDS as EDGE_KINDS
from .edges import EdgeInstrument as EdgeInstrument
from .edges import EdgeKind as EdgeKind
from .failing import Calls as Calls
from .failing import FailingGuest as FailingGuest
from .failing import FailingLazyGuest as FailingLazyGuest
from .failing import FailingStream as FailingStream
from .failing import FailingTracker as FailingTracker
from .fakes import Content as Content
from .fakes import JournalEntry as JournalEntry
from .fakes import ScriptedGuest as ScriptedGuest
from .fakes import Write as Write
from .lazy import LazyScriptedGuest as LazyScriptedGuest
from .link import VirtualLink as VirtualLink
from .link import VirtualStream as VirtualStream
from .link import virtual_link as virtual_link
from .parts import FakeBlock as FakeBlock
from .parts import FakeDevice as FakeDevice
from .parts import MarksTracker as MarksTracker
from .pipe import DIRECTIONS as DIRECTIONS
from .pipe import FAULT_KINDS as FAULT_KINDS
from .pipe import Direction as Direction
from .pipe import Fault as Fault
from .pipe import FaultKind as FaultKind
from .pipe import Transfer as Transfer
from .pipe import opposite as opposite
from .referee import OwnerReferee as OwnerReferee
from .referee import Violation as Violation
from .scenario import CancelAt as CancelAt
from .scenario import End as End
from .scenario import ExpireAt as ExpireAt
from .scenario import FailCall as FailCall
from .scenario import LeapAt as LeapAt
from .scenario import Point as Point
from .scenario import Run as Run
from .scenario import Scenario as Scenario
from .scenario import SweepContext as SweepContext
from .scenario import SweepFailure as SweepFailure
from .scenario import replay as replay
from .streams import DribbleStream as DribbleStream
from .streams import VirtualListener as VirtualListener
from .sweep import CallSweep as CallSweep
from .sweep import CancelSweep as CancelSweep
from .sweep import DeadlineSweep as DeadlineSweep
from .sweep import FaultSweep as FaultSweep
from .sweep import Sweep as Sweep
from .sweep import SweepReport as SweepReport
from .sweep import TimeLeap as TimeLeap
from .sweep import run_cancel_sweep as run_cancel_sweep
from .sweep import run_sweep as run_sweep
