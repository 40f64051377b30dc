"""The switchover between trimig and a real QEMU, with a relay between them that loses, delays and cuts at exact bytes.

Two facts are proved in both directions: at no point do two guests run, and if the network makes the answer unknowable,
trimig reports that and runs the guest on no side.

*trimig as the source* asks for a proof (a PING after the devices, answered when all is loaded) and then commits with
the end-of-file byte. A QEMU destination follows it: without that byte QEMU exits and has not run; with that byte QEMU
runs, whatever happens to the description after it.

*QEMU as the source* has no commit: if the connection ends before SHUT has come, QEMU resumes its guest by itself, also
if everything had left and the destination runs already (states.md G1). No later action of a destination can
help. So a trimig destination sends SHUT 0 only when its guest is really complete. Against the race there is
``Config(autostart=False)``: the guest stays paused until a user who knows that the source is gone resumes it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import trio

import trimig
import trimig.guests
from tests.qemu import peers
from tests.qemu.harness import Qemu
from tests.qemu.peers import LIMIT, SMALL
from tests.qemu.relay import Relay
from trimig import Ownership, Status

pytestmark = pytest.mark.qemu

#: The messages of a QEMU destination in a migration with return path: PONG 1, the
#: PONG of trimig's mark, the PONG of the prepare step, SHUT 0.
MESSAGE = 8
#: How far around the end-of-file byte the connection is cut, in bytes.
AROUND = 30
#: Number of cuts at the same time, each with QEMUs of its own.
LANES = 4

log = logging.getLogger(__name__)


async def in_lanes(points: list[int], one: Callable[[int], Awaitable[None]]) -> None:
    """*one* for every point, LANES at a time; a failure names its point."""
    queue = list(reversed(points))

    async def lane() -> None:
        while queue:
            point = queue.pop()
            try:
                await one(point)
            except BaseException as error:
                error.add_note(f"with the cut {point:+d} bytes from the end-of-file byte")
                raise

    async with trio.open_nursery() as nursery:
        for _ in range(LANES):
            nursery.start_soon(lane)


class Shape:
    """The place of the commit in the stream of an idle guest."""

    #: Offset of the end-of-file byte.
    eof: int
    #: Length of the whole stream.
    total: int


@pytest.fixture(scope="module")
def outgoing() -> Shape:
    """The layout for the guest of :func:`peers.source`, sent by trimig."""
    shape = Shape()

    async def measure() -> None:
        async with peers.relayed() as (_, relay):
            with peers.source() as guest:

                async def commit() -> None:
                    await trio.lowlevel.checkpoint()
                    shape.eof = relay.forward.received

                await trimig.migrate(guest, relay.uri, peers.settings(), commit=commit)
                shape.total = relay.forward.received

    trio.run(measure)
    return shape


@pytest.fixture(scope="module")
def incoming() -> Shape:
    """The layout for a QEMU with the memory of :func:`sender`; a parked guest keeps the description, whose length is
    needed."""
    shape = Shape()

    async def measure() -> None:
        async with Qemu.start("none", "1M") as vm:
            peers.mix(vm.ram, seed=1)
            with trimig.ParkedGuest() as guest:
                async with peers.arriving(guest) as arrival, Relay(arrival.uri) as relay:
                    await vm.migrate(relay.uri, capabilities={"return-path": True})
                    await arrival.summary()
                    shape.total = relay.forward.received
                assert guest.description is not None
                shape.eof = shape.total - len(guest.description) - 5 - 1

    trio.run(measure)
    return shape


# -- trimig -> relay -> QEMU -------------------------------------------------------------------------------------------


async def test_cut_at_each_byte_before_the_decision_leaves_one_guest_here(outgoing: Shape) -> None:
    """T1, L9: PONG cannot have come, or no commit was sent: the guest runs at the source, QEMU exits and has not run.

    The last of the points is the end-of-file byte itself: everything before it is delivered, the proof is there, and
    then the connection ends while the caller's commit hook is still busy.
    """
    with trio.fail_after(LIMIT):

        async def cut(point: int) -> None:
            async with peers.relayed() as (vm, relay):
                with peers.source() as guest:
                    relay.forward.cut_at = outgoing.eof + point

                    async def commit() -> None:
                        assert point == 0  # nothing less is ever proved
                        await trio.sleep(math.inf)  # ended by the connection's end, which the engine notices meanwhile

                    with pytest.raises(trimig.TransportFailed) as caught:
                        await trimig.migrate(guest, relay.uri, peers.settings(), commit=commit)
                    assert caught.value.owner is Ownership.SOURCE
                    assert guest.run_state == "running"
                    assert await vm.wait_exit() == 1
                    assert relay.forward.delivered == outgoing.eof + point
                    assert not any(event["event"] == "RESUME" for event in vm.qmp.events)

        points = list(range(-AROUND, 1))
        await in_lanes(points, cut)
    log.info("%d cuts, %d to %d bytes from the end-of-file byte", len(points), points[0], points[-1])


async def test_cut_at_each_byte_behind_the_decision_is_uncertain(outgoing: Shape) -> None:
    """T1, T2, gaps G1, G2: HandoverUncertain exactly from the first byte on; QEMU runs if it got that byte.

    The commit and the description leave in one write, and the relay keeps the bytes behind the point. Point 0: the
    commit was sent, and not delivered. The caller looks at the destination, and settles the owner.
    """
    with trio.fail_after(LIMIT):

        async def cut(point: int) -> None:
            async with peers.relayed() as (vm, relay):
                with peers.source() as guest:
                    relay.back.drop_from = 3 * MESSAGE

                    async def commit() -> None:
                        await trio.lowlevel.checkpoint()
                        relay.forward.hold_from = outgoing.eof + point

                    async def end() -> None:
                        await relay.forward.wait_until(
                            lambda d: d.received == outgoing.total and d.delivered == outgoing.eof + point
                        )
                        assert guest.run_state == "paused"
                        if point < outgoing.total - outgoing.eof:
                            assert await vm.query_status() == "inmigrate"  # also with the byte: it reads on
                        relay.cut()

                    monitor = trimig.Monitor()
                    with pytest.raises(trimig.HandoverUncertain) as caught:
                        await peers.while_migrating(guest, relay.uri, peers.settings(), monitor, end, commit=commit)
                    uncertain = caught.value
                    assert uncertain.owner is monitor.owner is Ownership.UNKNOWN
                    assert monitor.status is Status.UNCERTAIN
                    assert guest.run_state == "paused"
                    if point == 0:
                        assert await vm.wait_exit() == 1
                        assert not any(event["event"] == "RESUME" for event in vm.qmp.events)
                        await uncertain.settle(Ownership.SOURCE)
                        assert guest.run_state == "running"
                    else:
                        await vm.wait_status("running")
                        assert np.array_equal(vm.ram, peers.memory(guest))
                        await uncertain.settle(Ownership.DESTINATION)
                        assert guest.run_state == "paused"
                    assert uncertain.settled is uncertain.owner

        whole = outgoing.total - outgoing.eof
        points = [*range(AROUND + 1), whole // 2, whole - 1, whole]
        await in_lanes(points, cut)
    log.info("%d cuts, %d to %d bytes from the end-of-file byte", len(points), points[0], points[-1])


@pytest.mark.parametrize("kept", ["the whole of it", "the description", "the last byte"])
async def test_decision_held_back_and_released_completes(outgoing: Shape, kept: str) -> None:
    """A slow network is no fault: neither side runs the guest meanwhile, a cancel is refused, and then the migration
    ends."""
    point = {"the whole of it": 0, "the description": 1, "the last byte": outgoing.total - outgoing.eof - 1}[kept]
    async with peers.relayed() as (vm, relay):
        with peers.source() as guest:
            relay.forward.hold_from = outgoing.eof + point
            monitor = trimig.Monitor()

            async def release() -> None:
                await relay.forward.wait_until(lambda d: d.received == outgoing.total and not d._due())
                assert monitor.status is Status.HANDOVER
                assert monitor.owner is Ownership.UNKNOWN
                assert (await vm.query_status(), guest.run_state) == ("inmigrate", "paused")
                with pytest.raises(trimig.StateError, match="too late to cancel"):
                    monitor.cancel("the test")
                relay.forward.release()

            summary = await peers.while_migrating(guest, relay.uri, peers.settings(), monitor, release)
            await vm.wait_status("running")
            assert summary.confirmed
            assert guest.run_state == "paused"


async def test_scope_cancelled_during_the_handover_is_too_late() -> None:
    """Rule C7, gap G2: the cancellation is held off until the answer has come, and the answer decides."""
    async with peers.relayed() as (vm, relay):
        with peers.source() as guest:
            relay.back.hold_from = 3 * MESSAGE
            with trio.CancelScope() as scope:

                async def cancel() -> None:
                    await relay.back.wait_until(lambda d: d.received == 4 * MESSAGE)
                    scope.cancel()
                    await vm.wait_status("running")
                    assert guest.run_state == "paused"
                    relay.back.release()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(shielded, cancel)
                    summary = await trimig.migrate(guest, relay.uri, peers.settings())
                assert summary.confirmed
            assert guest.run_state == "paused"


async def shielded(call: Callable[[], Awaitable[None]]) -> None:
    """*call*, beside the cancelled task."""
    with trio.CancelScope(shield=True):
        await call()


@pytest.mark.parametrize("silent", ["dropped", "delayed beyond the timeout"])
async def test_lost_answer_is_uncertain_while_qemu_runs(silent: str) -> None:
    """T2, gap G1: SHUT is lost with the connection alive: paused here, running at QEMU, until the owner is settled."""
    async with peers.relayed() as (vm, relay):
        with peers.source() as guest:
            if silent == "dropped":
                relay.back.drop_from = 3 * MESSAGE
            else:
                relay.back.hold_from = 3 * MESSAGE
            monitor = trimig.Monitor()
            with pytest.raises(trimig.HandoverUncertain) as caught:
                await trimig.migrate(guest, relay.uri, peers.settings(handover_timeout=0.5), monitor=monitor)
            assert relay.back.received == 4 * MESSAGE
            await vm.wait_status("running")
            assert guest.run_state == "paused"
            with pytest.raises(trimig.StateError):
                await trimig.migrate(guest, relay.uri, monitor=monitor)  # refused until the owner is settled
            await caught.value.settle(Ownership.DESTINATION)
            with pytest.raises(trimig.StateError, match="already settled"):
                await caught.value.settle(Ownership.SOURCE)
            assert guest.run_state == "paused"


@pytest.mark.parametrize("drop", range(3 * MESSAGE + 1, 4 * MESSAGE))
async def test_answer_cut_anywhere_is_no_answer(drop: int) -> None:
    """T2: the connection ends inside of SHUT."""
    async with peers.relayed() as (vm, relay):
        with peers.source() as guest:
            relay.back.cut_at = drop
            monitor = trimig.Monitor()
            with pytest.raises(trimig.HandoverUncertain) as caught:
                await trimig.migrate(guest, relay.uri, peers.settings(), monitor=monitor)
            assert guest.run_state == "paused"
            await vm.wait_status("running")
            await caught.value.settle(Ownership.DESTINATION)
            assert guest.run_state == "paused"
            assert monitor.owner is Ownership.DESTINATION


@pytest.mark.parametrize("then", ["comes late", "never comes", "cancelled", "cut", "reset"])
async def test_proof_of_prepare(then: str) -> None:
    """The PONG after the devices: QEMU has everything and waits; until the commit the source can still cancel."""
    async with peers.relayed() as (vm, relay):
        with peers.source() as guest:
            relay.back.hold_from = 2 * MESSAGE
            monitor = trimig.Monitor()

            async def act() -> None:
                await relay.back.wait_until(lambda d: d.received == 3 * MESSAGE)
                assert monitor.status is Status.DEVICE
                assert monitor.owner is Ownership.SOURCE
                assert (await vm.query_status(), guest.run_state) == ("inmigrate", "paused")
                if then == "comes late":
                    relay.back.release()
                elif then == "cancelled":
                    monitor.cancel("the test")
                elif then in ("cut", "reset"):
                    relay.cut(reset=then == "reset")

            config = peers.settings(handover_timeout=0.5 if then == "never comes" else 30.0)
            if then == "comes late":
                summary = await peers.while_migrating(guest, relay.uri, config, monitor, act)
                assert summary.prepared
                await vm.wait_status("running")
                assert guest.run_state == "paused"
                return
            with pytest.raises(trimig.TrimigError) as caught:
                await peers.while_migrating(guest, relay.uri, config, monitor, act)
            assert isinstance(
                caught.value, trimig.MigrationCancelled if then == "cancelled" else trimig.TransportFailed
            )
            assert caught.value.owner is Ownership.SOURCE
            assert guest.run_state == "running"
            assert await vm.wait_exit() == 1
            assert not any(event["event"] == "RESUME" for event in vm.qmp.events)


async def test_commit_hook_that_fails_takes_everything_back() -> None:
    """design.md part 5: QEMU has proved that it has the guest; the commit could not be recorded: the source goes on."""
    async with peers.target() as (vm, uri):
        with peers.source() as guest:

            async def commit() -> None:
                assert await vm.query_status() == "inmigrate"
                raise OSError("no space left for the decision")

            with pytest.raises(trimig.GuestFailed, match="no space left"):
                await trimig.migrate(guest, uri, peers.settings(), commit=commit)
            assert guest.run_state == "running"
            assert await vm.wait_exit() == 1
            await peers.accepted(guest)


async def test_destination_started_by_another_client() -> None:
    """``-S`` at QEMU: the guest is handed over and confirmed, and stays paused until QEMU gets ``cont``."""
    with trio.fail_after(LIMIT):
        async with Qemu.start("none", "1M", incoming="defer", paused=True) as vm:
            with peers.source() as guest:
                summary = await trimig.migrate(guest, await vm.incoming(peers.LISTEN), peers.settings())
                assert summary.confirmed
                await vm.wait_status("paused", "prelaunch")
                assert guest.run_state == "paused"
                await vm.qmp.execute("cont")
                await vm.wait_status("running")


# -- QEMU -> relay -> trimig -------------------------------------------------------------------------------------------


async def test_cut_at_each_byte_of_qemus_ending(incoming: Shape) -> None:
    """T1, gap G1: up to the end-of-file byte only QEMU has the guest; with that byte trimig has it, once.

    After that byte QEMU resumes its copy at the cut, by itself. With ``autostart=False`` trimig's guest is whole
    and paused, so that never two run; a user who knows that QEMU is gone resumes trimig's guest.
    """
    with trio.fail_after(LIMIT):

        async def cut(point: int) -> None:
            async with Qemu.start("none", "1M") as vm:
                peers.mix(vm.ram, seed=1)
                with peers.machine(running=False) as guest:
                    async with (
                        peers.arriving(guest, peers.settings(autostart=False)) as arrival,
                        Relay(arrival.uri) as relay,
                    ):
                        relay.forward.cut_at = incoming.eof + point
                        await vm.migrate(relay.uri, capabilities={"return-path": True}, wait=False)
                        if point <= 0:
                            error = await arrival.error()
                            assert isinstance(error, trimig.TransportFailed | trimig.RemoteProtocolError)
                            assert error.owner is Ownership.SOURCE
                            assert guest.run_state == "inmigrate"
                        else:
                            await arrival.summary()
                            assert arrival.monitor.owner is Ownership.DESTINATION
                            assert np.array_equal(vm.ram, peers.memory(guest))
                            assert guest.run_state == "paused"
                        await vm.wait_migration_status("failed")
                        assert relay.forward.delivered == incoming.eof + point
                    await vm.wait_status("running")
                    assert guest.run_state != "running"

        whole = incoming.total - incoming.eof
        points = [*range(-AROUND, AROUND + 1), whole // 2, whole - 1]
        await in_lanes(points, cut)
    log.info("%d cuts, %d to %d bytes from the end-of-file byte", len(points), points[0], points[-1])


@pytest.mark.parametrize("autostart", [True, False])
async def test_answer_to_qemu_is_lost(*, autostart: bool) -> None:
    """T2, gap G1: QEMU's reaction to a missing SHUT, and that trimig's guest is not a second one.

    While the connection stands QEMU waits, and does not run. At a cut QEMU resumes its guest, without a
    question. A guest that trimig started at once then runs twice. QEMU causes that, and trimig cannot know it;
    autostart=False prevents it.
    """
    async with Qemu.start("none", "1M") as vm:
        peers.mix(vm.ram, seed=1)
        with peers.machine(running=False) as guest:
            config = peers.settings(autostart=autostart, teardown_grace=0.5)
            async with peers.arriving(guest, config) as arrival, Relay(arrival.uri) as relay:
                relay.back.drop_from = MESSAGE
                await vm.migrate(relay.uri, capabilities={"return-path": True}, wait=False)
                await arrival.summary()
                await relay.back.wait_until(lambda d: d.received == 2 * MESSAGE)
                assert guest.run_state == ("running" if autostart else "paused")
                assert (await vm.query_migrate())["status"] in ("active", "device")
                await vm.wait_status("finish-migrate")
                relay.cut()
                await vm.wait_migration_status("failed")
                await vm.wait_status("running")
                if not autostart:
                    assert guest.run_state == "paused"


class Slow(trimig.AppGuest):
    """A guest whose start takes a while."""

    def __init__(self) -> None:
        super().__init__("none", running=False)
        self.add_ram("m0", SMALL)
        self.add_device(trimig.guests.TimerState())
        self.asked = trio.Event()
        self.go = trio.Event()

    async def activate(self, run_state: str) -> None:
        self.asked.set()
        await self.go.wait()
        await super().activate(run_state)


async def test_qemu_is_told_only_when_the_guest_is_really_there() -> None:
    """J5, M8: trimig has sent only PONGs while the guest is still being started; QEMU's guest stays stopped until
    SHUT."""
    async with Qemu.start("none", "1M") as vm:
        with Slow() as guest:
            async with peers.arriving(guest) as arrival, Relay(arrival.uri) as relay:
                await vm.migrate(relay.uri, capabilities={"return-path": True}, wait=False)
                await guest.asked.wait()
                await trio.sleep(0.1)
                assert relay.back.received == MESSAGE
                await vm.wait_status("finish-migrate")
                assert (await vm.query_migrate())["status"] in ("active", "device")
                guest.go.set()
                await vm.wait_migration_status("completed")
                assert (await arrival.summary()).confirmed
                assert relay.back.received == 2 * MESSAGE
            assert guest.run_state == "running"
        await vm.wait_status("postmigrate")


async def test_receiver_cancelled_while_the_guest_comes_to_life() -> None:
    """Too late: the commit has been read. The guest arrives, QEMU gets SHUT, and no cancellation is left over."""
    async with Qemu.start("none", "1M") as vm:
        with Slow() as guest:
            async with peers.arriving(guest) as arrival:
                await vm.migrate(arrival.uri, capabilities={"return-path": True}, wait=False)
                await guest.asked.wait()
                arrival.scope.cancel()
                with pytest.raises(trimig.StateError, match="too late"):
                    arrival.monitor.cancel("the test")
                guest.go.set()
                await vm.wait_migration_status("completed")
                await arrival.summary()
            assert guest.run_state == "running"


@pytest.mark.parametrize("kept", [1, 7, 400])
async def test_ending_of_qemu_held_back_and_released(incoming: Shape, kept: int) -> None:
    """A slow network: no side runs the guest while the end is on its way, and then trimig does."""
    async with Qemu.start("none", "1M") as vm:
        peers.mix(vm.ram, seed=1)
        with peers.machine(running=False) as guest:
            async with peers.arriving(guest) as arrival, Relay(arrival.uri) as relay:
                relay.forward.hold_from = incoming.total - kept
                await vm.migrate(relay.uri, capabilities={"return-path": True}, wait=False)
                await relay.forward.wait_until(lambda d: d.received == incoming.total and d.held == kept)
                assert (await vm.query_status(), guest.run_state) == ("finish-migrate", "inmigrate")
                relay.forward.release()
                await vm.wait_migration_status("completed")
                await arrival.summary()
            assert guest.run_state == "running"
            assert np.array_equal(vm.ram, peers.memory(guest))


async def test_without_return_path_qemu_is_done_when_its_socket_is(incoming: Shape) -> None:
    """Gap G3: QEMU gives the guest up as soon as its bytes are in a socket; after a cut no side has the guest.

    trimig cannot change that. It does not run an incomplete guest, and reports that no guest arrived.
    """
    async with Qemu.start("none", "1M") as vm:
        peers.mix(vm.ram, seed=1)
        with peers.machine(running=False) as guest:
            async with peers.arriving(guest) as arrival, Relay(arrival.uri) as relay:
                relay.forward.hold_last = incoming.total - incoming.eof
                await vm.migrate(relay.uri, capabilities={"return-path": False})
                await relay.forward.wait_until(lambda d: d.ended)
                relay.cut()
                error = await arrival.error()
            assert isinstance(error, trimig.TransportFailed | trimig.RemoteProtocolError)
            assert guest.run_state == "inmigrate"
        await vm.wait_status("postmigrate")
