"""What holds over the whole life of a guest: refusals in every status, changes on the way, progress, and who it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Pair, config, running, waiting
from trimig.guest import PAGE_SIZE
from trimig.status import IDLE, Status
from trimig.testing import FakeDevice, ScriptedGuest, VirtualLink

HERE, THERE = "00112233-4455-6677-8899-aabbccddeeff", "ffffffff-4455-6677-8899-aabbccddeeff"

# -- refusals in every status --------------------------------------------------------------------------------------


async def refusals(monitor: trimig.Monitor) -> dict[str, str]:
    """What each call says in the present status, with other guests and on a stream of its own."""
    said = {}
    link = VirtualLink()
    with pytest.raises(trimig.StateError) as caught:
        await trimig.migrate(running(), link.a, config(), monitor=monitor)
    said["migrate"] = str(caught.value)
    with pytest.raises(trimig.StateError) as caught:
        await trimig.receive(waiting(), link.b, config(), monitor=monitor)
    said["receive"] = str(caught.value)
    assert link.closed
    try:
        monitor.resume()
    except trimig.StateError as error:
        said["resume"] = str(error)
    return said


async def test_calls_in_every_status_of_a_migration(autojump_clock: trio.testing.MockClock) -> None:
    """F1, F13: another migration is refused in each; resume everywhere but in pre-switchover; parameters never are."""
    slow = {"pause": 1.0, "save": 1.0}
    pair = Pair(
        running(pages=16, delays=slow),
        waiting(pages=16, delays={"activate": 1.0}),
        link=VirtualLink(rate=100_000, window=4096),
        config_here=dataclasses.replace(config(), capabilities=trimig.Capabilities(pause_before_switchover=True)),
    )
    seen: dict[Status, dict[str, str]] = {}

    async def ask(status: Status) -> None:
        assert await pair.here.wait_status(status) is status
        pair.here.set_parameters(downtime_limit=1000)
        seen[status] = await refusals(pair.here)

    async with trio.open_nursery() as nursery:
        for status in (Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE, Status.HANDOVER):
            nursery.start_soon(ask, status)
        await pair.both()
    for status, said in seen.items():
        in_progress = f"a migration is in progress ({status.value})"
        expected = {"migrate": in_progress, "receive": in_progress}
        if status is not Status.PRE_SWITCHOVER:
            expected["resume"] = f"there is no pause before the switchover to go on from: the status is {status.value}"
        assert said == expected
    assert set(seen) == {Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE, Status.HANDOVER}
    assert pair.target.running
    assert Status.COMPLETED in IDLE


async def test_nothing_new_while_the_owner_is_open(autojump_clock: trio.testing.MockClock) -> None:
    """Gap G1: an open question must be settled first; a cancel does nothing to it."""
    pair = Pair(target=waiting(delays={"activate": 1000.0}), config_there=config(handover_timeout=500.0))
    here, _ = await pair.both()
    assert isinstance(here, trimig.HandoverUncertain)
    said = await refusals(pair.here)
    assert said["migrate"] == "a migration is in progress (uncertain)"
    pair.here.cancel("has no effect")
    assert pair.here.status is Status.UNCERTAIN


# -- changes on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(20_000, 200_000), (200_000, 20_000)])
async def test_changed_bandwidth_works_within_two_windows(
    autojump_clock: trio.testing.MockClock, before: int, after: int
) -> None:
    """D13: the rate follows within 200 ms."""
    pair = Pair(running(pages=256, content="random"), config_here=config(max_bandwidth=before))
    sent: list[int] = []

    async def change() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(2)
        pair.here.set_parameters(max_bandwidth=after)
        await trio.sleep(0.2)
        for _ in range(2):
            sent.append(pair.link.sent("a->b"))
            await trio.sleep(2)
        pair.here.set_parameters(max_bandwidth=0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await pair.both()
    assert (sent[1] - sent[0]) / 2 == pytest.approx(after, rel=0.15)


async def test_limit_of_the_downtime_counts_at_the_next_decision(autojump_clock: trio.testing.MockClock) -> None:
    """D16: passes that would never end, end."""
    pair = Pair(
        running(pages=64, rate=1000),
        link=VirtualLink(rate=1e6, window=8192),
        config_here=config(downtime_limit=10),
    )
    passes: list[int] = []

    async def change() -> None:
        await pair.here.wait_status(Status.ACTIVE)
        await trio.sleep(5)
        passes.append(pair.here.statistics().iteration)
        pair.here.set_parameters(downtime_limit=2000)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        here, _ = await pair.both()
    assert here.iterations <= passes[0] + 1
    assert passes[0] > 3


# -- progress, and why not -----------------------------------------------------------------------------------------


def eager() -> ScriptedGuest:
    """Writes more than a link of 1 MB/s takes."""
    return running(pages=64, rate=3000)


async def test_progress_never_runs_backwards(autojump_clock: trio.testing.MockClock) -> None:
    """The first copy and the later passes are shown apart: what is dirtied again takes nothing back."""
    pair = Pair(
        eager(),
        config_here=config(downtime_limit=50, max_iterations=20, on_bound="switchover", max_bandwidth=1_000_000),
    )
    first: list[float] = []
    progress: list[float] = []
    remaining: list[int] = []

    async def watch() -> None:
        async for picture in pair.here.watch(0.02):
            first.append(picture.first_copy)
            progress.append(picture.convergence_progress)
            remaining.append(picture.remaining)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pair.both()
    assert first == sorted(first)
    assert progress == sorted(progress)
    assert remaining != sorted(remaining, reverse=True), "the guest was not busy enough for this test"
    assert (first[0], first[-1]) == (0.0, 1.0)
    assert any(0 < share < 1 for share in first)
    assert 0 < progress[-1] < 1
    assert all(share == 0 for share, copied in zip(progress, first, strict=True) if copied < 1)


async def test_why_it_does_not_converge_is_said_everywhere(autojump_clock: trio.testing.MockClock) -> None:
    """L6: in info() while it runs, in the statistics, and in the error: the same words."""
    pair = Pair(
        eager(), link=VirtualLink(rate=1e6, window=8192), config_here=config(downtime_limit=50, max_iterations=10)
    )
    shown: list[dict[str, Any]] = []

    def listener(event: trimig.Event) -> None:
        if event.name == "PASS":
            shown.append(pair.here.info()["convergence"])

    pair.here.add_listener(listener)
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert shown[-1] == {"converging": False, "reason": here.reason, "advice": list(here.advice)}
    assert here.reason in str(here)
    assert all(clause in str(here) for clause in here.advice)
    assert any(clause.startswith("raise downtime-limit to") for clause in here.advice)
    assert not any("max-bandwidth" in clause for clause in here.advice)
    assert pair.here.statistics().convergence == trimig.Convergence(
        converging=False, reason=here.reason, advice=here.advice
    )
    assert "convergence" not in pair.here.info()


async def test_bandwidth_limit_that_binds_is_the_first_advice(autojump_clock: trio.testing.MockClock) -> None:
    """Raising it would help, so that is what is said first."""
    pair = Pair(eager(), config_here=config(downtime_limit=50, max_iterations=6, max_bandwidth=1_000_000))
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert here.advice[0].startswith("raise max-bandwidth (0.954 MiB/s)")


async def test_summary_says_why_it_converged(autojump_clock: trio.testing.MockClock) -> None:
    """And the destination has nothing to say of it."""
    here, there = await Pair().both()
    assert here.convergence.converging
    assert here.convergence.advice == ()
    assert there.convergence is None


async def test_advice_of_an_idle_guest_leaves_the_shown_downtime_alone(autojump_clock: trio.testing.MockClock) -> None:
    """G14: without a dirty rate the member keeps the limit it began with, as in QEMU."""
    pair = Pair(config_here=config(downtime_limit=77))
    shown: list[int] = []

    def listener(event: trimig.Event) -> None:
        if event.name == "PASS":
            shown.append(pair.here.info()["expected-downtime"])

    pair.here.add_listener(listener)
    await pair.both()
    assert shown == [77]


# -- who it is -----------------------------------------------------------------------------------------------------


def app(uuid: str | None, *, running: bool) -> trimig.AppGuest:
    """A guest that may have a UUID."""
    guest = trimig.AppGuest("app", running=running)
    guest.add_ram("ram", 16384)
    guest.uuid = uuid
    return guest


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize(
    ("here", "there", "passes"),
    [(HERE, HERE, True), (HERE, THERE, False), (None, THERE, True), (HERE, None, True), (None, None, True)],
)
async def test_uuid_is_compared_where_both_have_one(
    autojump_clock: trio.testing.MockClock, here: str | None, there: str | None, *, passes: bool, switch: bool
) -> None:
    """A.1 rows 18 to 21: equal passes, different fails at the destination, unset on either side is accepted.

    Without the capability nothing is sent, and nothing is compared.
    """
    link = VirtualLink(record=True)
    settings = dataclasses.replace(config(), capabilities=trimig.Capabilities(validate_uuid=switch))
    ends: dict[str, trimig.Summary | trimig.TrimigError] = {}

    async def side(name: str, *, source: bool) -> None:
        try:
            if source:
                ends[name] = await trimig.migrate(guest, link.a, settings)
            else:
                ends[name] = await trimig.receive(target, link.b, config())
        except trimig.TrimigError as error:
            ends[name] = error

    with app(here, running=True) as guest, app(there, running=False) as target:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: side("there", source=False))
            await side("here", source=True)
        assert (b"configuration/uuid" in link.recorded("a->b")) is (switch and here is not None)
        if passes or not switch:
            assert isinstance(ends["there"], trimig.Summary)
            assert isinstance(ends["here"], trimig.Summary)
            assert any("no UUID is sent" in text for text in ends["here"].warnings) is (switch and here is None)
            assert any("none to compare" in text for text in ends["there"].warnings) is (
                switch and here is not None and there is None
            )
            return
        error = ends["there"]
        assert isinstance(error, trimig.RemoteProtocolError)
        assert HERE in str(error)
        assert THERE in str(error)
        assert isinstance(ends["here"], trimig.TrimigError)
        assert guest.run_state == "running"


async def test_parameter_without_effect_is_told_by_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    """The migration is done; what nothing reads is named in the summary, in info() and, if it is set late, there too."""
    changed = dataclasses.replace(config(), parameters=trimig.Parameters(x_checkpoint_delay=4, max_bandwidth=0))
    pair = Pair(config_here=changed, config_there=changed)

    def listener(event: trimig.Event) -> None:
        if event.name == "PASS":
            pair.here.set_parameters(announce_rounds=9)

    pair.here.add_listener(listener)
    await pair.both()
    for monitor, names in (
        (pair.here, ["x-checkpoint-delay", "announce-rounds"]),
        (pair.there, ["x-checkpoint-delay"]),
    ):
        warnings = monitor.info()["warnings"]
        assert [text.split()[2] for text in warnings] == names
        assert all("has no effect yet" in text for text in warnings)


@pytest.mark.parametrize(("said", "passes"), [(0, 3), (10**12, 1)])
async def test_a_bandwidth_for_the_switchover_replaces_the_measured_one(
    autojump_clock: trio.testing.MockClock, said: int, passes: int
) -> None:
    """avail-switchover-bandwidth: the threshold follows it; the copy before it is as fast as it was."""
    parameters = trimig.Parameters(max_bandwidth=100 * PAGE_SIZE, downtime_limit=10, avail_switchover_bandwidth=said)
    settings = dataclasses.replace(config(), parameters=parameters, max_iterations=3, on_bound="switchover")
    source = running(pages=64, dirty_per_sync=40, working_set=60)
    pair = Pair(source=source, config_here=settings)
    await pair.both()
    assert pair.here.statistics().iteration == passes


def test_uuid_has_one_form() -> None:
    """As it stands on QEMU's command line; upper case is the same one."""
    with app(HERE.upper(), running=True) as guest:
        assert guest.uuid == HERE
        for wrong in ("", "{" + HERE + "}", HERE[:-1], HERE.replace("-", ""), "zz" + HERE[2:]):
            with pytest.raises(trimig.ConfigError, match="UUID"):
                guest.uuid = wrong
        assert guest.uuid == HERE


# -- guests that raise ---------------------------------------------------------------------------------------------


class Failing(ScriptedGuest):
    """Raises OSError at once, not only when it is awaited."""

    def __init__(self, call: str, **options: Any) -> None:
        super().__init__(**options)
        self._fails = call

    def dirty_tracker(self) -> Any:
        """Fails, or does not."""
        if self._fails == "dirty_tracker":
            raise OSError("no userfaultfd")
        return super().dirty_tracker()

    def pause(self) -> Any:
        """No coroutine function: it fails before there is anything to await."""
        if self._fails == "pause":
            raise OSError("no such process")
        return super().pause()


@pytest.mark.parametrize(("call", "reason"), [("dirty_tracker", "no userfaultfd"), ("pause", "no such process")])
async def test_synchronous_failure_of_a_guest_is_the_guests(
    autojump_clock: trio.testing.MockClock, call: str, reason: str
) -> None:
    """An OSError of the guest's is not taken for one of the transport's."""
    pair = Pair(Failing(call, blocks={"ram": 4}, devices=[FakeDevice("clock", size=8)]))
    here, _ = await pair.both()
    assert isinstance(here, trimig.GuestFailed)
    assert reason in str(here)
    assert pair.source.running
