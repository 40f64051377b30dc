"""Auto-converge in whole migrations: the steps, what the guest does then, and the end of the throttle in every outcome."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import trio
import trio.testing

import trimig
from tests.engine.pair import Destination, Pair, config, played, running
from trimig.engine.source.throttle import steps_of
from trimig.policy.throttle import Steps
from trimig.status import TERMINAL, Status
from trimig.testing import FakeDevice, LazyScriptedGuest, ScriptedGuest, VirtualLink

#: Bytes per second of the link: all pages take a second and a little more, so that each pass is a period.
RATE: Final = 24_000
PAGES: Final = 6


def converging(**options: Any) -> trimig.Config:
    """A configuration with auto-converge. Parameters by name; no bound on the passes."""
    named = {"downtime_limit": options.pop("downtime_limit", 200), "max_bandwidth": 0}
    bounds = {name: options.pop(name) for name in ("max_total_time", "teardown_grace") if name in options}
    found = config(handover_timeout=5.0, **bounds)
    return dataclasses.replace(
        found,
        capabilities=trimig.Capabilities(auto_converge=True, postcopy_ram=options.pop("postcopy_ram", False)),
        parameters=trimig.Parameters(**named, **options),
    )


def busy(rate: float = 24, **options: Any) -> ScriptedGuest:
    """Writes each of its pages several times while all of them are sent once."""
    return running(pages=PAGES, rate=rate, **options)


def pair_of(source: ScriptedGuest | None = None, **options: Any) -> Pair:
    target = options.pop("target", None)
    link = VirtualLink(rate=RATE, window=8192, latency=0.001)
    return Pair(source or busy(), target, link=link, config_here=converging(**options))


def throttles(guest: ScriptedGuest) -> list[int]:
    """What the guest was throttled by, in order."""
    return [int(entry.detail) for entry in guest.journal if entry.event == "throttle"]


def at_throttle(pair: Pair, percent: int, act: Callable[[], object]) -> None:
    """Do that once the guest is throttled by *percent*."""

    def heard(event: trimig.Event) -> None:
        if event.name == "THROTTLE" and event.data["percent"] == percent:
            act()

    pair.here.add_listener(heard)


async def full_speed(guest: ScriptedGuest) -> None:
    """The guest runs here, and is not slowed down."""
    assert guest.running
    guest.update()
    before = guest.guest_time
    await trio.sleep(1)
    guest.update()
    assert guest.guest_time - before == pytest.approx(1)


# -- the steps -----------------------------------------------------------------------------------------------------------


async def test_guest_is_throttled_until_it_converges(autojump_clock: trio.testing.MockClock) -> None:
    """S3, G7, L10: 20, 30, 40, ... and 0 at the end; shown as long as there is a throttle."""
    pair = pair_of()
    shown: dict[int, object] = {}
    without = 0

    def look(event: trimig.Event) -> None:
        nonlocal without
        info = pair.here.info()
        if not pair.here.statistics().throttle and "expected-downtime" in info:
            assert "cpu-throttle-percentage" not in info
            without += 1
        if event.name == "THROTTLE" and "ram" in info and event.data["percent"]:
            shown[event.data["percent"]] = info["cpu-throttle-percentage"]
            assert pair.here.statistics().throttle == event.data["percent"]

    pair.here.add_listener(look)
    assert "cpu-throttle-percentage" not in pair.here.info()
    here, _ = await pair.both()
    steps = throttles(pair.source)
    assert steps[:4] == [20, 30, 40, 50]
    assert steps[-1] == 0
    assert shown == {percent: percent for percent in steps[:-1]}
    assert without
    assert here.downtime < 0.6
    assert pair.source.digest() == pair.target.digest()
    assert "cpu-throttle-percentage" not in pair.here.info()
    assert (pair.here.status, pair.here.statistics().throttle) == (Status.COMPLETED, 0)
    assert throttles(pair.target) == []


async def test_without_the_capability_the_guest_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    pair = pair_of(max_total_time=8.0)
    pair.config_here = dataclasses.replace(pair.config_here, capabilities=trimig.Capabilities())
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert throttles(pair.source) == []


async def test_guest_that_converges_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    pair = pair_of(busy(rate=2))
    await pair.both()
    assert throttles(pair.source) == []


async def test_parameters_set_the_steps(autojump_clock: trio.testing.MockClock) -> None:
    """D5, A.1 row 22: the first throttle is 5 %, it grows up to 95 %."""
    pair = pair_of(busy(rate=2000), cpu_throttle_initial=5, cpu_throttle_increment=45, max_cpu_throttle=95,
                   downtime_limit=200)  # fmt: skip
    pair.here.add_listener(
        lambda event: pair.here.set_parameters(downtime_limit=2000) if trio.current_time() > 9 else None
    )
    await pair.both()
    assert throttles(pair.source) == [5, 50, 95, 0]


async def test_missing_progress_is_warned_of_when_the_throttle_cannot_rise(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pair = pair_of(busy(rate=2000), cpu_throttle_initial=40, max_cpu_throttle=40, max_total_time=12.0)
    warned: list[int] = []
    pair.here.add_listener(
        lambda event: warned.append(pair.here.statistics().throttle) if event.name == "WARNING" else None
    )
    await pair.both()
    assert warned == [40]
    assert "raise max-cpu-throttle (40 %) to" in pair.here.info()["warnings"][0]


def test_each_parameter_is_read() -> None:
    """S3: all five have their effect in :class:`Steps`, which tests/policy tests."""
    parameters = trimig.Parameters(
        throttle_trigger_threshold=61, cpu_throttle_initial=7, cpu_throttle_increment=8, cpu_throttle_tailslow=True,
        max_cpu_throttle=77,
    )  # fmt: skip
    assert steps_of(parameters) == Steps(threshold=61, initial=7, increment=8, tailslow=True, maximum=77)


async def test_threshold_decides_what_is_too_much(autojump_clock: trio.testing.MockClock) -> None:
    """Nearly all pages are dirtied again, and the words of the records are sent as well: more than 90 %, not 100 %."""
    for threshold, begins in ((90, True), (100, False)):
        pair = pair_of(throttle_trigger_threshold=threshold, max_total_time=6.0)
        await pair.both()
        assert bool(throttles(pair.source)) is begins, threshold


async def test_changes_meanwhile_take_effect(autojump_clock: trio.testing.MockClock) -> None:
    """D2: the next step uses the new increment; a lower maximum counts after the pass."""
    pair = pair_of(busy(rate=2000), downtime_limit=1)
    seen: list[int] = []

    def heard(event: trimig.Event) -> None:
        if event.name != "THROTTLE":
            return
        seen.append(event.data["percent"])
        if seen == [20]:
            pair.here.set_parameters(cpu_throttle_increment=40, cpu_throttle_initial=1)
        elif seen == [20, 60]:
            pair.here.set_parameters(max_cpu_throttle=35)
        elif seen == [20, 60, 35]:
            pair.here.set_parameters(max_cpu_throttle=50)
        elif seen == [20, 60, 35, 50]:
            pair.here.set_parameters(downtime_limit=2000)

    pair.here.add_listener(heard)
    await pair.both()
    assert seen == [20, 60, 35, 50, 0]


# -- what the guest does -------------------------------------------------------------------------------------------------


class Application:
    """An application that writes one page after the other, as fast as its guest lets it; it counts."""

    def __init__(self, guest: trimig.AppGuest) -> None:
        self._guest = guest
        self._pages = guest.add_ram("ram", PAGES * 4096).pages
        self._pages[:] = np.random.default_rng(1).integers(1, 255, self._pages.shape, np.uint8)
        self.written = 0
        #: Writes in a second at full speed.
        self.per_second = 24.0

    async def run(self) -> None:
        """Write until the guest was handed over."""
        try:
            while True:
                async with self._guest.running():
                    await trio.sleep(1 / self.per_second)
                    self._pages[self.written % PAGES, :8] = self.written % 251
                    self.written += 1
        except trimig.NotOwner:
            return


async def moved_application(guest: trimig.AppGuest, app: Application, monitor: trimig.Monitor) -> None:
    """Migrate an application that writes too fast, with auto-converge."""
    link = VirtualLink(rate=RATE, window=8192, latency=0.001)
    with trimig.AppGuest(running=False) as target:
        target.add_ram("ram", PAGES * 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.run)
            nursery.start_soon(trimig.receive, target, link.b, converging())
            await trimig.migrate(guest, link.a, converging(), monitor=monitor)
        assert np.array_equal(guest.ram[0].pages, target.ram[0].pages)


async def test_application_is_slowed_down_by_that_share(autojump_clock: trio.testing.MockClock) -> None:
    """S3: counted by its writes in each second of a throttle; the tasks inside the gate get the rest of the time."""
    monitor, speeds = trimig.Monitor(), {}
    with trimig.AppGuest(dirty_tracking="compare") as guest:
        app = Application(guest)
        since = [(0.0, 0)]

        def heard(event: trimig.Event) -> None:
            if event.name != "THROTTLE" or not event.data["percent"]:
                return
            (began, count), percent = since[-1], event.data["percent"]
            speeds[percent] = (app.written - count) / (trio.current_time() - began)
            since.append((trio.current_time(), app.written))

        monitor.add_listener(heard)
        await moved_application(guest, app, monitor)
        assert guest.throttle_percent == 0
    # The speed before each step: all of it before the first, 80 % before the second, and so on.
    assert len(speeds) >= 4
    for percent, speed in speeds.items():
        before = 0 if percent == 20 else percent - 10
        assert speed == pytest.approx(24 * (100 - before) / 100, rel=0.1)


async def test_application_may_shed_load_instead(autojump_clock: trio.testing.MockClock) -> None:
    """S3, L10: it is told the share, and 0 at the end; its tasks do not wait in the gate."""
    shares: list[float] = []

    async def shed(share: float) -> None:
        await trio.lowlevel.checkpoint()
        shares.append(share)
        app.per_second = 24 * (1 - share)

    with trimig.AppGuest(dirty_tracking="compare", on_throttle=shed) as guest:
        app = Application(guest)
        await moved_application(guest, app, trimig.Monitor())
        assert guest.throttle_percent == 0
    assert shares[:3] == [0.2, 0.3, 0.4]
    assert shares[-1] == 0


class Undecided(ScriptedGuest):
    """Sheds load from half of it on; below that it leaves it to the throttle."""

    def __init__(self) -> None:
        super().__init__(blocks={"ram": PAGES}, rate=24, devices=[FakeDevice("clock", size=8, seed=1)])
        self.shares: list[float] = []

    async def on_throttle(self, share: float) -> bool:
        """Record it."""
        await trio.lowlevel.checkpoint()
        self.shares.append(share)
        return share >= 0.5


async def test_guest_is_slowed_down_as_long_as_it_sheds_nothing(autojump_clock: trio.testing.MockClock) -> None:
    guest = Undecided()
    await pair_of(guest, max_total_time=15.0).both()
    assert throttles(guest) == [20, 30, 40, 0]
    assert guest.shares[:5] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert guest.shares[-1] == 0


async def test_guest_without_the_hook_is_told_of_once(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimig.source")
    await pair_of().both()
    said = [record.message for record in caplog.records if "slows the guest" in record.message]
    assert said == [
        "auto-converge slows the guest 'scripted' down; a guest that has on_throttle could shed load instead"
    ]


# -- the end in every outcome --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["monitor", "scope"])
async def test_cancel_ends_the_throttle(how: str, autojump_clock: trio.testing.MockClock) -> None:
    """L10, F10: the guest runs on at full speed."""
    pair = pair_of()
    with trio.CancelScope() as scope:
        at_throttle(pair, 40, scope.cancel if how == "scope" else functools.partial(pair.here.cancel, "the test"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_received, pair)
            if how == "monitor":
                with pytest.raises(trimig.MigrationCancelled):
                    await pair.migrate()
            else:
                await pair.migrate()
    assert throttles(pair.source) == [20, 30, 40, 0]
    assert pair.here.status is Status.CANCELLED
    assert "cpu-throttle-percentage" not in pair.here.info()
    await full_speed(pair.source)


async def _received(pair: Pair) -> None:
    with pytest.raises(trimig.TrimigError):
        await pair.receive()


async def test_lost_connection_ends_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    """L9, L10."""
    pair = pair_of()
    at_throttle(pair, 30, functools.partial(pair.link.inject, "reset"))
    here, _ = await pair.both()
    assert isinstance(here, trimig.TransportFailed)
    assert throttles(pair.source) == [20, 30, 0]
    await full_speed(pair.source)


async def test_bound_ends_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    """L10: the migration is given up."""
    pair = pair_of(busy(rate=2000), downtime_limit=1, max_total_time=6.0)
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert throttles(pair.source)[-1] == 0
    assert "pause" not in pair.source.events()
    await full_speed(pair.source)


async def test_refusal_at_the_end_ends_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    """L10, K4: the guest was stopped, and runs here again."""

    class Unwilling(ScriptedGuest):
        async def activate(self, run_state: str) -> None:
            await trio.lowlevel.checkpoint()
            raise trimig.GuestFailed("no room")

    target = Unwilling(blocks={"ram": PAGES}, devices=[FakeDevice("clock", size=8)], run_state="inmigrate")
    pair = pair_of(target=target)
    here, _ = await pair.both()
    assert isinstance(here, trimig.PeerFailed)
    assert throttles(pair.source)[-1] == 0
    assert pair.source.events().index("resume") < len(pair.source.events()) - 1
    await full_speed(pair.source)


async def test_missing_answer_ends_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    """L10: the guest stays paused; it is not slowed down if it is resumed later."""
    pair = pair_of()

    async def script(destination: Destination) -> None:
        await destination.prepare()
        await destination.until_closed()

    async with played(pair, script):
        with pytest.raises(trimig.HandoverUncertain) as caught:
            await pair.migrate()
        assert not pair.source.running
        assert throttles(pair.source)[-1] == 0
        await caught.value.settle(trimig.Ownership.SOURCE)
    await full_speed(pair.source)


async def test_switch_to_postcopy_ends_the_throttle(autojump_clock: trio.testing.MockClock) -> None:
    """L10, G7: the guest at the source does not run any more; nothing is shown in `postcopy-active`."""
    target = LazyScriptedGuest(
        blocks={"ram": PAGES}, run_state="inmigrate", devices=[FakeDevice("clock", size=8)], touches=(3, 5)
    )
    pair = pair_of(target=target, downtime_limit=1, postcopy_ram=True)
    at_throttle(pair, 30, pair.here.start_postcopy)
    at_end: list[object] = []
    at_throttle(pair, 0, lambda: at_end.append((pair.here.status in TERMINAL, pair.here.counters.remaining > 0)))
    here, _ = await pair.both()
    assert isinstance(here, trimig.Summary)
    assert throttles(pair.source) == [20, 30, 0]
    assert at_end == [(False, True)]


# -- a guest that fails --------------------------------------------------------------------------------------------------


class Stubborn(ScriptedGuest):
    """A guest whose throttle fails at certain values, or never returns."""

    def __init__(self, *fails: int, hangs: bool = False) -> None:
        super().__init__(blocks={"ram": PAGES}, rate=24, devices=[FakeDevice("clock", size=8, seed=1)])
        self._fails = fails
        self._hangs = hangs
        self.asked: list[int] = []

    async def throttle(self, percent: int) -> None:
        """As of a scripted guest, or as said."""
        self.asked.append(percent)
        if percent in self._fails:
            if self._hangs:
                await trio.sleep_forever()
            raise OSError("no brake")
        await super().throttle(percent)


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_throttle_that_fails_is_a_warning(hangs: bool, autojump_clock: trio.testing.MockClock) -> None:
    """T3, T5: the migration goes on without it; what may be in force is ended."""
    guest = Stubborn(30, hangs=hangs)
    pair = pair_of(guest, max_total_time=12.0)
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert guest.asked == [20, 30, 0]
    (warning,) = [text for text in pair.here.info()["warnings"] if "goes on without" in text]
    assert "auto-converge goes on without a throttle: throttling the guest" in warning
    assert ("took longer than 5 s" if hangs else "no brake") in warning
    await full_speed(guest)


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
async def test_throttle_that_cannot_be_ended_is_a_warning(hangs: bool, autojump_clock: trio.testing.MockClock) -> None:
    """T3: within teardown_grace, after the guest runs; the failure of the migration is still the bound."""
    guest = Stubborn(0, hangs=hangs)
    pair = pair_of(guest, downtime_limit=1, max_total_time=6.0, teardown_grace=2.0)
    here, _ = await pair.both()
    assert isinstance(here, trimig.NotConverging)
    assert any("could not be released from its throttle" in text for text in pair.here.info()["warnings"])
    assert trio.current_time() < 6.0 + 2.0 + 1.5


async def test_handed_over_guest_that_cannot_be_released_is_no_matter(autojump_clock: trio.testing.MockClock) -> None:
    guest = Stubborn(0)
    pair = pair_of(guest)
    here, _ = await pair.both()
    assert isinstance(here, trimig.Summary)
    assert not any("released" in text for text in here.warnings)
    assert guest.asked[-1] == 0
